"""``reward.sources``: what is refused, what the short forms mean, and what the reward role is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import recipe

MODEL, FUNCTION = {"load": "rm"}, {"function": "f.py"}
SERVICE = {"url": "http://127.0.0.1:8000/score"}


def with_sources(*sources: Any, **reward: Any) -> dict[str, Any]:
    return recipe(reward={"load": None, "sources": list(sources), **reward})


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([{}], "reward.sources[0]: expected exactly one of load, function, url and rule; none of them is set"),
        ([FUNCTION, {**MODEL, **FUNCTION}], "reward.sources[1]: expected exactly one of load, function, url and rule"),
        (["f.py"], 'reward.sources[0] = "f.py": expected a mapping such as {function: my.py, weight: 0.5}'),
        ([{**FUNCTION, "wieght": 2}], 'reward.sources[0].wieght: unknown key; did you mean "weight"?'),
        ([{**FUNCTION, "weight": "2"}], 'reward.sources[0].weight = "2": expected a number, got text'),
        ([{**FUNCTION, "weight": float("inf")}], "reward.sources[0].weight = Infinity: expected a finite number"),
        ([{**FUNCTION, "weight": 0}], "reward.sources: every weight is 0, so all completions tie"),
        ([{**FUNCTION, "scale": "batches"}], 'scale = "batches": expected one of none, batch, rank, running; did you'),
        ([{**FUNCTION, "missing": 0}], "reward.sources[0].missing = 0: expected one of drop, leave_out"),
        ([{**FUNCTION, "name": "a/b"}], 'reward.sources[0].name = "a/b": expected letters, digits, dots'),
        ([{**FUNCTION, "name": ""}], 'reward.sources[0].name = ""'),
        ([{**FUNCTION, "name": "chosen"}], "rewards/chosen is the implicit reward of DPO already"),
        ([{**FUNCTION, "name": "a"}, {**MODEL, "name": "a"}], "reward.sources: 2 sources are named 'a'"),
        ([{**FUNCTION, "read_at": "last_token"}], "only a reward model (load) reads it, and this source is a function"),
        ([{**MODEL, "form": "slime"}], "only a service (url) reads it, and this source is a model"),
        ([{**FUNCTION, "options": {"a": 1}}], "only a rule reads them, and this source is a function"),
        ([{"rule": "maths"}], 'reward.sources[0].rule: "maths" is no rule; did you mean "math"?'),
        ([{"rule": "regex", "options": {"patern": "a"}}], "reward.sources[0].options"),
        ([{"function": "f.txt"}], 'reward.sources[0].function = "./f.txt": expected a file that ends in .py'),
        ([{"url": "host:8000"}], "reward.sources[0].url: expected an http or https address"),
        ([{"url": "http://169.254.169.254/latest"}], "is a link-local or metadata address"),
        ([{"url": "http://me:secret@host/score"}], "reward.sources[0].url: the address holds a user or a password"),
        ([{**SERVICE, "form": "verl"}], 'form = "verl": expected one of rlxf, openrlhf, slime'),
        ([{**SERVICE, "label_column": "answer"}], "only the forms openrlhf and slime send a label"),
        ([{**SERVICE, "batch_size": 0}], "reward.sources[0].batch_size = 0: expected at least 1"),
        ([{**SERVICE, "timeout_s": 0}], "reward.sources[0].timeout_s = 0: expected greater than 0"),
        ([{**SERVICE, "tries": 2.5}], "reward.sources[0].tries = 2.5: expected a whole number"),
    ],
)
def test_a_wrong_source_is_told_with_its_place(sources: list[Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(with_sources(*sources))
    (problem,) = caught.value.problems
    assert says in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"function": "f.py", "sources": [MODEL]}, "reward.function and reward.sources are both set"),
        ({"load": "other", "sources": [MODEL]}, "reward.load and reward.sources are both set"),
        ({"load": "rm", "workers": -1}, "reward.workers = -1: expected at least 0"),
        ({"load": "rm", "timeout_s": 0}, "reward.timeout_s = 0: expected greater than 0"),
        ({"load": "rm", "sources": "f.py"}, 'reward.sources = "f.py": expected a list'),
        ({"load": None}, "reward.load is required: a reward model's folder; or give reward.function"),
    ],
)
def test_a_wrong_reward_section_is_told(reward: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(reward=reward))
    assert any(says in problem for problem in caught.value.problems)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(with_sources({**FUNCTION, "weight": "1"}, {**SERVICE, "tries": 0}))
    assert [problem.partition(" = ")[0] for problem in caught.value.problems] == [
        "reward.sources[0].weight",
        "reward.sources[1].tries",
    ]


def test_a_short_form_is_a_list_of_one() -> None:
    (model,) = load_config(recipe()).reward.listed
    assert (model.name, model.kind, model.weight, model.scale) == ("rm", "model", 1.0, "none")
    (function,) = load_config(recipe(reward={"load": None, "model": None, "function": "my/f.py"})).reward.listed
    assert (function.name, function.kind) == ("f", "function")


def test_paths_are_absolute_and_names_are_unique() -> None:
    config = load_config(with_sources(MODEL, MODEL, FUNCTION, {"rule": "length", "options": {"max": 9}}, SERVICE))
    assert [source.name for source in config.reward.listed] == ["rm", "rm_2", "f", "length", "127.0.0.1"]
    first, _, function, *_ = config.reward.sources
    assert (first.load, function.function) == (str(Path("rm").absolute()), str(Path("f.py").absolute()))


def test_the_role_is_made_for_the_first_model() -> None:
    config = load_config(with_sources(FUNCTION, {**MODEL, "read_at": "end_of_turn"}, {"load": "rm2"}))
    assert (config.reward.load, config.scores) == (str(Path("rm").absolute()), True)
    sections = config.reward_models
    assert [section.load for section in sections.values()] == [str(Path(name).absolute()) for name in ("rm", "rm2")]
    assert [section.model for section in sections.values()] == ["tiny", ""]
    assert [section.read_at for section in sections.values()] == ["end_of_turn", "auto"]
    assert not load_config(with_sources(FUNCTION, model=None)).scores  # no device


def test_a_dumped_recipe_is_a_recipe() -> None:
    config = load_config(with_sources(MODEL, {**SERVICE, "weight": 0.5}))
    assert load_config(config.dump()) == config


@pytest.mark.parametrize(
    ("typed", "left"),
    [("sources", ("load", "function")), ("function", ("load", "sources")), ("load", ("function", "sources"))],
)
def test_what_is_typed_replaces_the_others(typed: str, left: tuple[str, ...]) -> None:
    reward = {"load": "rm", "function": "f.py", "sources": [{"rule": "length", "options": {"max": 9}}]}
    config = load_config(recipe(reward=reward), typed=[f"reward.{typed}"])
    assert all(not getattr(config.reward, key) for key in left)
    assert len(config.reward.listed) == 1


def test_functions_run_beside_the_driver_and_in_it_for_debugging() -> None:
    assert load_config(with_sources(FUNCTION, model=None)).reward_workers == 1
    local = recipe(reward={"load": None, "model": None, "function": "f.py"}, runtime="local", rollout={"engine": "hf"})
    assert load_config(local).reward_workers == 0
    local["reward"]["workers"] = 3
    assert load_config(local).reward_workers == 3


def test_a_threshold_needs_scores() -> None:
    judged = recipe(
        reward={"load": None, "model": None},
        judge={"function": "j.py"},
        algorithm={"pairing": "threshold", "score_threshold": 0.5},
    )
    with pytest.raises(ConfigError, match="expected best_worst, all or random with a judge"):
        load_config(judged)
