"""The keys of the judge: what is refused, what a typed judge replaces, and which metric decides the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.changes import compare
from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import recipe

URL = "http://127.0.0.1:8000/v1"
SERVER = {"base_url": URL, "model": "m"}


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(**changes))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ({"fuction": "f.py"}, 'judge.fuction = "f.py": unknown key; did you mean "judge.function"?'),
        ({"function": "f.txt"}, "expected a file that ends in .py"),
        ({"function": "f.py", **SERVER}, "judge.function and judge.base_url are set: expected one of them"),
        ({"function": "f.py", "load": "d", **SERVER}, "judge.load and judge.function and judge.base_url are set"),
        ({"base_url": URL}, "judge.model is required with judge.base_url"),
        ({"model": "gpt"}, 'judge.model = "gpt": nothing reads it without judge.base_url'),
        ({"function": "f.py", "temperature": 0.7}, "judge.temperature = 0.7: nothing reads it without judge.base_url"),
        ({**SERVER, "load_as": "pair_classifier"}, "nothing reads it without judge.load; set that"),
        ({**SERVER, "base_url": "localhost:8000"}, "judge.base_url: expected an http or https address"),
        ({**SERVER, "base_url": "ftp://host/v1"}, "judge.base_url: expected an http or https address"),
        ({**SERVER, "base_url": "http://169.254.169.254/v1"}, "link-local or metadata address"),
        ({**SERVER, "base_url": URL + "?key=1"}, "judge.base_url: expected an address without ? and #"),
        ({**SERVER, "token_env": "sk-proj-abcdefgh"}, "judge.token_env: expected the name of an environment variable"),
        ({**SERVER, "answer": "yaml"}, 'judge.answer = "yaml": expected one of json, arena'),
        ({**SERVER, "temperature": -1}, "judge.temperature = -1: expected at least 0"),
        ({**SERVER, "temperature": float("nan")}, "judge.temperature = NaN: expected a finite number"),
        ({**SERVER, "concurrency": 0}, "judge.concurrency = 0: expected at least 1"),
        ({**SERVER, "tries": 1.5}, "judge.tries = 1.5: expected a whole number"),
        ({**SERVER, "timeout_s": 0}, "judge.timeout_s = 0: expected greater than 0"),
        ({**SERVER, "max_calls": 0}, "judge.max_calls = 0: expected at least 1"),
        ({**SERVER, "max_cost": 5}, "judge.max_cost = 5.0: expected prices, too"),
        ({**SERVER, "options": "top_p=1"}, "judge.options = \"top_p=1\": expected a mapping, or one in JSON"),
        ({**SERVER, "options": {"messages": []}}, "'messages' cannot be set here; use judge.template"),
        ({**SERVER, "options": {"stream": True}}, "'stream' cannot be set here"),
        ({**SERVER, "options": {"temperature": 1}}, "'temperature' cannot be set here; use judge.temperature"),
        ({"function": "f.py", "tournament": "swiss"}, 'judge.tournament = "swiss": expected one of knockout, all'),
        ({"function": "f.py", "both_orders": "yes"}, 'judge.both_orders = "yes": expected true or false'),
        ({"load": "d", "load_as": "pair_classifier", "pair_template": "{prompt} {first}"}, "{second} is not there"),
        ({"load": "d", "load_as": "pair_classifier", "first_label": 2}, "judge.first_label = 2: expected at most 1"),
        ({"load": "d", "load_as": "classifier"}, "expected one of reward_model, pair_classifier"),
    ],
)  # fmt: skip
def test_a_wrong_judge_gets_one_line_with_key_and_fix(judge: dict[str, Any], says: str) -> None:
    found = problems(judge=judge)
    assert len(found) == 1, found
    assert found[0].startswith("judge.")
    assert says in found[0]


@pytest.mark.parametrize(
    "secret", [{"token_env": "sk-proj-abcdefgh"}, {"base_url": "http://me:sk-proj-abcdefgh@host/v1"}]
)
def test_a_secret_in_the_recipe_is_not_repeated(secret: dict[str, str]) -> None:
    (found,) = problems(judge={**SERVER, **secret})
    assert "abcdefgh" not in found
    assert "token_env" in found


@pytest.mark.parametrize(
    ("evaluation", "judge", "says"),
    [
        ({"reference_answers": "a.jsonl"}, {}, "eval.reference_answers = "),
        ({"reference_column": "answer"}, {}, 'eval.reference_column = "answer": expected a judge'),
        ({"reference_answers": "a.jsonl", "reference_column": "b"}, SERVER, "are both set: answers come from one"),
        ({"reference_answers": "a.csv"}, SERVER, "expected a file that ends in .jsonl"),
    ],
)
def test_reference_answers_need_a_judge_and_come_from_one_place(
    evaluation: dict[str, Any], judge: dict[str, Any], says: str
) -> None:
    (found,) = problems(eval=evaluation, judge=judge, training={"eval_interval": 1})
    assert says in found


def test_a_token_that_is_not_there_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    found = problems(judge={**SERVER, "token_env": "NO_SUCH_TOKEN"}, dry_run=False)
    assert 'judge.token_env = "NO_SUCH_TOKEN": this environment variable is not set; export NO_SUCH_TOKEN' in "".join(
        found
    )
    load_config(recipe(judge={**SERVER, "token_env": "NO_SUCH_TOKEN"}))  # a dry run


def test_a_template_must_hold_the_three_placeholders(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Which is better? {prompt} {first}")
    (found,) = problems(judge={**SERVER, "template": str(file)})
    assert "expected {prompt}, {first}, {second} in the text; {second} is not there" in found
    file.write_bytes(b"\xff{prompt} {first} {second}")
    (found,) = problems(judge={**SERVER, "template": str(file)})
    assert "cannot be read as UTF-8" in found
    file.write_text("{prompt} {first} {second}")
    load_config(recipe(judge={**SERVER, "template": str(file)}))


@pytest.mark.parametrize(
    ("settings", "load_as", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "pair_classifier", "is a LlamaForCausalLM, which has no score head"),
        ({"num_labels": 2}, "reward_model", "has 2 labels; a reward model has one; or set judge.load_as"),
        ({"num_labels": 3}, "pair_classifier", "has 3 labels; a classifier over two answers has one or two"),
    ],
)
def test_a_model_that_cannot_judge_is_refused(
    tmp_path: Path, settings: dict[str, Any], load_as: str, says: str
) -> None:
    values = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **settings}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (found,) = problems(judge={"load": str(tmp_path), "load_as": load_as})
    assert says in found


def test_a_judge_needs_no_reward_and_decides_by_its_win_rate() -> None:
    alone = load_config(recipe(reward={"load": None, "model": None}, judge=SERVER))
    assert alone.judges_alone
    assert alone.best_metric == ("eval/win_rate", True)
    both = load_config(recipe(judge=SERVER))
    assert both.judges
    assert both.best_metric == ("eval/reward", True)
    assert load_config(recipe()).best_metric == ("eval/reward", True)
    named = load_config(recipe(reward={"load": None, "model": None}, judge=SERVER, training={"keep_best_metric": "x"}))
    assert named.best_metric[0] == "x"


def test_a_typed_judge_replaces_the_one_of_the_recipe() -> None:
    judge = {**SERVER, "temperature": 0.5, "function": "f.py", "tournament": "all"}
    config = load_config(recipe(judge=judge), typed={"judge.function"})
    assert (config.judge.kind, config.judge.model, config.judge.temperature) == ("function", None, 0.0)
    assert config.judge.tournament == "all"


def test_an_offline_run_ignores_the_judge(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(recipe(training={"stage": "dpo"}, judge=SERVER))
    assert not config.judges
    assert "judge has no effect" in caplog.text


def test_options_may_be_json() -> None:
    config = load_config(recipe(judge={**SERVER, "options": '{"max_tokens": null, "max_completion_tokens": 5}'}))
    assert config.judge.options == {"max_tokens": None, "max_completion_tokens": 5}
    json.dumps(config.dump())


def test_another_judge_is_another_curve_and_its_budget_is_not() -> None:
    with_judge = load_config(recipe(judge=SERVER))
    before = load_config(recipe()).dump()
    del before["judge"]  # of an earlier version
    assert compare(before, load_config(recipe())).curve == []
    assert any("judge.base_url null" in change for change in compare(before, with_judge).curve)
    cheaper = load_config(recipe(judge={**SERVER, "max_calls": 3, "concurrency": 1, "verdicts": "here"}))
    assert compare(with_judge.dump(), cheaper).curve == []
    assert compare(with_judge.dump(), load_config(recipe(judge={**SERVER, "tournament": "all"}))).curve
