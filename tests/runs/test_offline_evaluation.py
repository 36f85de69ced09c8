"""Runs that sample nothing evaluate their own loss on held-out rows: at every stage, and alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.data_world import write_rows
from tests.runs.small import Finished, Recipe, World, run

WORDS = ("red", "green", "blue", "white", "black", "brown")
PAIRS = [
    {"prompt": f"{word} or not? ", "chosen": f"yes, {word}", "rejected": f"no {i}"} for i, word in enumerate(WORDS)
]
EXAMPLES = [{"prompt": f"say {word} ", "completion": f"{word}, {'very ' * i}{word}"} for i, word in enumerate(WORDS)]
ROWS = {"dpo": PAIRS, "rm": PAIRS, "sft": EXAMPLES}
NAMES = {
    "dpo": {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected",
    },
    "rm": {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"},
    "sft": {"loss"},
}  # fmt: skip


def recipe(world: World, folder: Path, stage: str, **training: Any) -> Recipe:
    """Held out are the training rows, so that an evaluation can be held against the step after it."""
    data = write_rows(folder / "rows.jsonl", ROWS[stage])
    return world.recipe(
        training={
            "stage": stage, "train_iters": 4, "eval_interval": 2, "save_interval": 2, "seq_length": 96,
            "global_batch_size": len(WORDS), **training,
        },
        actor_rollout={
            "data_path": str(data), "max_prompt_length": 64, "ppo_mini_batch_size": len(WORDS), "no_shuffle": True,
            "save": str(folder / "ckpt"),
        },
        eval={"data_path": str(data)},
        reward={"model": None, "load": None},
    )  # fmt: skip


@pytest.mark.parametrize("stage", ROWS)
def test_an_evaluation_says_what_the_step_after_it_says_of_the_same_rows(
    world: World, tmp_path: Path, stage: str
) -> None:
    done = run(recipe(world, tmp_path, stage), tmp_path / "run")
    rows = read_jsonl(done.folder / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows[:2]:
        step = done.rows[row["step"]]  # the next one: made before its update
        found = {name.removeprefix("eval/"): value for name, value in row.items() if name != "step"}
        assert found.keys() >= NAMES[stage]
        for name in NAMES[stage]:
            assert found[name] == pytest.approx(step[name], rel=1e-5, abs=1e-5), name
    assert rows[2]["eval/loss"] < rows[1]["eval/loss"] < rows[0]["eval/loss"]
    assert best(tmp_path) == (4, "eval/loss", "min", rows[2]["eval/loss"])


def best(folder: Path) -> tuple[int, str, str, float]:
    found = json.loads((folder / "ckpt" / "best_checkpointed_iteration.json").read_text())
    assert (folder / "ckpt" / "best_checkpointed_iteration.txt").read_text() == f"{found['step']}\n"
    return found["step"], found["metric"], found["mode"], found["value"]


@pytest.mark.parametrize("stage", ROWS)
def test_a_checkpoint_is_evaluated_as_the_training_run_did(
    world: World, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(recipe(world, tmp_path, stage), tmp_path / "run")
    capsys.readouterr()
    only = recipe(world, tmp_path, stage, eval_only=True, resume=str(tmp_path / "ckpt" / "iter_0000002"))
    done = run(only, tmp_path / "evaluated")
    assert read_jsonl(done.folder / "eval.jsonl") == read_jsonl(trained.folder / "eval.jsonl")[1:2]
    told = " ".join(capsys.readouterr().out.split())
    assert "evaluated after 2 steps" in told
    assert "held-out loss" in told


def test_an_evaluation_alone_computes_the_reference_of_its_own_rows_only(world: World, tmp_path: Path) -> None:
    wanted = recipe(world, tmp_path, "dpo", eval_only=True)
    wanted["ref"] |= {"precompute_ref_log_probs": True, "cache": str(tmp_path / "cache")}
    run(wanted, tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_the_size_of_the_batches_does_not_matter(world: World, tmp_path: Path) -> None:
    def evaluated(size: int) -> Finished:
        folder = tmp_path / str(size)
        folder.mkdir()
        return run(recipe(world, folder, "dpo", eval_only=True, global_batch_size=size), folder / "run")

    (whole,), (cut,) = (read_jsonl(evaluated(size).folder / "eval.jsonl") for size in (6, 4))
    assert cut == pytest.approx(whole, rel=1e-5, abs=1e-5)
