"""scripts/compare_models.py: even and better models, both ways round, its files, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlxf.tools.compare.models import Settings, recipe
from tests.data_world import write_rows
from tests.runs.small import World, make_world
from tests.scripts_here import script
from tests.tiny_models import EOS

LIKED = "a"
REWARD = f"""
def reward(prompts, completions, completion_ids, **columns):
    assert columns["topic"][0] in ("one", "two", "three", "four")
    return [float(text.count({LIKED!r})) for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    (folder / "reward.py").write_text(REWARD)
    teach(folder / "policy", folder / "run" / "policy")
    return made


def teach(folder: Path, better: Path) -> None:
    """A model that says what is liked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(folder, better)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer.encode(f"say {word} 3" + LIKED * 8), EOS] for word in ("one", "two", "six")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(better)


@pytest.fixture(scope="module")
def main() -> Callable[..., int]:
    """The command in this process, with the arguments as they are typed."""
    return script("compare_models")


def options(world: World, out: Path | None = None, **changes: object) -> list[object]:
    """Of a small comparison; ``changes``: another value, or None to leave an option out."""
    wanted: dict[str, object] = {
        "data": world.folder / "prompts.jsonl",
        "reward-function": world.folder / "reward.py",
        "max-new-tokens": 12,
        "max-prompt-length": 24,
        "device": "cpu",
        "resamples": 200,
        "out": out,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return [part for name, value in wanted.items() if value is not None for part in (f"--{name}", value)]


def results(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


@pytest.mark.parametrize("sampled", [(), ("--sample",)])
def test_a_model_is_even_with_itself(
    main: Callable[..., int], world: World, tmp_path: Path, sampled: tuple[str, ...]
) -> None:
    policy = world.folder / "policy"
    assert main(policy, policy, *options(world, tmp_path / "out"), *sampled) == 0
    numbers, rows = results(tmp_path / "out")
    assert (numbers["rate"], numbers["length_controlled"], numbers["ties"]) == (0.5, 0.5, len(rows))
    assert all(row["a"] == row["b"] and row["winner"] == "tie" for row in rows)
    assert len(rows) == 12


def test_a_better_model_wins_and_swapping_gives_one_minus_that(
    main: Callable[..., int], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, better = world.folder / "policy", world.folder / "run"  # a run folder stands for its policy
    assert main(better, policy, *options(world, tmp_path / "ab"), "--sample") == 0
    table = capsys.readouterr().out
    assert main(policy, better, *options(world, tmp_path / "ba"), "--sample") == 0
    (one, rows), (two, swapped) = results(tmp_path / "ab"), results(tmp_path / "ba")
    assert one["rate"] > 0.9
    assert one["wilson"]["low"] > 0.6
    assert one["rate"] == 1 - two["rate"]
    assert one["length_controlled"] == pytest.approx(1 - two["length_controlled"], abs=1e-9)
    assert [(row["a"], row["b"], row["score_a"]) for row in rows] == [
        (row["b"], row["a"], row["score_b"]) for row in swapped
    ]
    assert (one["a"], one["b"]) == (two["b"], two["a"])
    assert f"{one['rate']:.3f}" in table
    assert "Wilson" in table


def test_the_files_hold_what_the_numbers_come_from(main: Callable[..., int], world: World, tmp_path: Path) -> None:
    policy, better = world.folder / "policy", world.folder / "run"
    assert main(better, policy, *options(world, tmp_path, num_prompts=7, missing_eos_penalty=2)) == 0
    numbers, rows = results(tmp_path)
    assert numbers["prompts"] == len(rows) == 7
    assert [row["row"] for row in rows] == list(range(7))
    assert rows[1]["prompt"] == "say two 1"
    for row in rows:
        for side in "ab":
            assert row[f"score_{side}"] == row[side].count(LIKED) - (0 if row[f"eos_{side}"] else 2)
    outcomes = [{"a": 1.0, "tie": 0.5, "b": 0.0}[row["winner"]] for row in rows]
    assert numbers["rate"] == pytest.approx(np.mean(outcomes))
    assert numbers["a"]["score"] == pytest.approx(np.mean([row["score_a"] for row in rows]))
    assert numbers["b"]["length"] == pytest.approx(np.mean([len(row["b"]) for row in rows]))


def test_the_number_of_prompts_at_a_time_changes_nothing(
    main: Callable[..., int], world: World, tmp_path: Path
) -> None:
    policy, better = world.folder / "policy", world.folder / "run"
    for size in (64, 5):
        assert main(better, policy, *options(world, tmp_path / str(size), batch_size=size), "--sample") == 0
    assert results(tmp_path / "64")[1] == results(tmp_path / "5")[1]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_says_what_the_exact_engine_says(main: Callable[..., int], world: World, tmp_path: Path) -> None:
    policy, better = world.folder / "policy", world.folder / "run"
    for engine in ("hf", "vllm"):
        assert main(better, policy, *options(world, tmp_path / engine, engine=engine)) == 0
    (exact, rows), (fast, others) = results(tmp_path / "hf"), results(tmp_path / "vllm")
    same = [one["a"] == two["a"] and one["b"] == two["b"] for one, two in zip(rows, others, strict=True)]
    assert sum(same) >= len(rows) - 1  # but for a near tie of two tokens
    assert fast["rate"] == pytest.approx(exact["rate"], abs=0.1)


def test_an_engine_whose_process_dies_is_told(
    main: Callable[..., int], world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlxf.tools.compare import models

    monkeypatch.setattr(models, "_generate", dies)
    policy = world.folder / "policy"
    assert main(policy, policy, *options(world, engine="vllm")) == 1
    assert "error: the process of the vLLM engine died with" in capsys.readouterr().err


def dies(*arguments: object) -> None:
    os._exit(3)


def test_an_engine_that_does_not_answer_is_ended_and_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlxf.core.errors import StageTimeout
    from rlxf.tools.compare import models

    monkeypatch.setattr(models, "_generate", hangs)
    asked = models.Settings(data_path=world.folder / "prompts.jsonl", num_prompts=1, engine="vllm")
    config = models.recipe(world.folder / "policy", asked)
    quick = config.training.model_copy(update={"start_timeout_s": 1, "stage_timeout_s": 1})
    begin = time.monotonic()
    with pytest.raises(StageTimeout, match=r"no answer within 2 s from the vLLM engine with .*policy"):
        models._generate_apart(config.model_copy(update={"training": quick}), [None], None, "cpu")  # type: ignore
    assert time.monotonic() - begin < 60
    assert not multiprocessing.active_children()


def hangs(*arguments: object) -> None:
    time.sleep(600)


def test_a_reward_model_judges(main: Callable[..., int], world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    policy, better = world.folder / "policy", world.folder / "run"
    judge = {"reward_function": None, "reward_model": world.folder / "reward"}
    assert main(better, policy, *options(world, tmp_path, **judge)) == 0
    _, rows = results(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForSequenceClassification.from_pretrained(world.folder / "reward").eval()
    row = next(row for row in rows if not row["eos_b"])  # its text is all that was said
    ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["b"], add_special_tokens=False)
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    assert row["score_b"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("position", ["auto", "last_token", "end_of_turn"])
def test_the_reward_model_is_read_where_the_command_says(
    main: Callable[..., int], world: World, position: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy, judge = world.folder / "policy", world.folder / "reward"
    settings = Settings(data_path=world.folder / "prompts.jsonl", num_prompts=2, reward_model=judge, read_at=position)
    reward = recipe(policy, settings).reward
    assert (reward.read_at, reward.seq_length) == (position, 512)  # all that the model has positions for
    few = options(world, reward_function=None, reward_model=judge, num_prompts=2, max_new_tokens=4, read_at=position)
    assert main(policy, policy, *few) == 0
    assert caplog.text.count("its config.json has no rlxf_read_at") == (position == "auto")


def test_prompts_without_a_score_are_told_and_do_not_count(
    main: Callable[..., int], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function = tmp_path / "some.py"
    function.write_text(
        "def reward(completions, number, **rest):\n    return [1.0 if n > 3 else None for n in number]\n"
    )
    policy = world.folder / "policy"
    assert main(policy, policy, *options(world, tmp_path / "out", reward_function=function)) == 0
    numbers, rows = results(tmp_path / "out")
    assert (numbers["prompts"], numbers["compared"]) == (12, 8)
    assert [row["winner"] for row in rows[:5]] == [None] * 4 + ["tie"]
    assert "4 prompts, not counted" in capsys.readouterr().out


def wrong_flags() -> list[tuple[str, dict[str, object], str]]:
    return [
        (
            "no judge",
            {"reward_function": None},
            "one of the arguments --reward-model --reward-function --judge-function --judge-url",
        ),
        ("two judges", {"reward_model": "rm"}, "not allowed with argument"),
        ("no data", {"data": None}, "the following arguments are required: --data"),
        ("confidence", {"confidence": 95}, "--confidence: expected a number at least 0.5, at most 0.9999, got '95'"),
        ("temperature", {"temperature": 0.7}, "--temperature needs --sample"),
        ("top-p", {"top_p": 1.5}, "--top-p: expected a number above 0, at most 1, got '1.5'"),
        ("num-prompts", {"num_prompts": 0}, "--num-prompts: expected a whole number at least 1, got '0'"),
        ("resamples", {"resamples": "many"}, "--resamples: expected a whole number at least 100, got 'many'"),
        ("nan", {"missing_eos_penalty": "nan"}, "--missing-eos-penalty: expected a number at least 0, got 'nan'"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in wrong_flags()], ids=[c[0] for c in wrong_flags()]
)
def test_a_wrong_flag_is_one_clear_line(
    main: Callable[..., int], world: World, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    policy = world.folder / "policy"
    with pytest.raises(SystemExit) as caught:
        main(policy, policy, *options(world, **changes))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def files(tmp_path: Path) -> dict[str, Path]:
    """What is wrong in one way each."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "pairs.jsonl").write_text("mine\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "fails.py").write_text("def reward(**all):\n    raise ValueError('no idea')\n")
    (tmp_path / "silent.py").write_text("def reward(completions, **all):\n    return [None] * len(completions)\n")
    write_rows(tmp_path / "long.jsonl", [{"prompt": "far too long for so few tokens " * 9}])
    (tmp_path / "file").write_text("")
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("nowhere", {}, "nowhere: no config.json there or in"),
        ("empty", {}, "empty: no config.json there or in"),
        ("adapter", {}, "adapter: holds a LoRA adapter only; name a folder with merged weights"),
        (None, {"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        (None, {"data": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        (None, {"data": "long.jsonl"}, "the prompt is longer than"),
        (None, {"prompt_key": "question"}, "question"),
        (None, {"reward_function": "fails.py"}, "`reward` failed"),
        (None, {"reward_function": "silent.py"}, "no prompt has a score for both models"),
        (None, {"reward_function": "nowhere.py"}, "no such file"),
        (None, {"reward_function": None, "reward_model": "empty"}, "empty: "),
        (None, {"out": "taken"}, "holds pairs.jsonl already; name another folder"),
        (None, {"out": "file/below"}, "--out "),
    ],
)
def test_wrong_input_is_an_error_and_writes_nothing(
    main: Callable[..., int],
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str | None,
    changes: dict[str, str | None],
    message: str,
) -> None:
    made = files(tmp_path)
    keep = ("prompt_key",)
    found = {
        name: tmp_path / value if value is not None and name not in keep else value for name, value in changes.items()
    }
    policy = world.folder / "policy"
    before = sorted(tmp_path.rglob("*"))
    code = main(tmp_path / model if model else policy, policy, *options(world, **{"out": tmp_path / "out", **found}))
    assert code == (1 if "`reward` failed" in message else 2)  # what the user wrote is right, but its code fails
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before
    assert made["taken"].joinpath("pairs.jsonl").read_text() == "mine\n"
