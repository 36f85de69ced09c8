"""``training.eval_only`` on Ray: what a training run in one process said after the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Recipe
from tests.cluster.test_launch import succeed

pytestmark = pytest.mark.cluster


def only(checkpoints: Path) -> tuple[str, ...]:
    return "training.eval_only=true", f"training.resume={checkpoints / 'iter_0000002'}"


def row(run_dir: Path, step: int) -> dict[str, Any]:
    """An evaluation, but for what is held against the one before."""
    (found,) = (row for row in read_jsonl(run_dir / "eval.jsonl") if row["step"] == step)
    return {name: value for name, value in found.items() if "_previous" not in name}


@pytest.mark.slow  # in one process: tests/runs/test_eval_only.py
def test_four_roles_evaluate_a_checkpoint_and_leave_none(recipe: Recipe, tmp_path: Path) -> None:
    common = ("training.eval_interval=2", "training.save_interval=2", "eval.num_prompts=4")
    succeed(recipe.run(tmp_path / "trained", "runtime=local", *common))
    succeed(recipe.run(tmp_path / "ray", *common, *only(tmp_path / "trained" / "checkpoints")))
    assert row(tmp_path / "ray", 2) == row(tmp_path / "trained", 2)
    assert {path.name for path in (tmp_path / "ray").iterdir()} == {"eval.jsonl", "summary.json", "config.yaml"}


@pytest.mark.slow
def test_two_data_parallel_ranks_evaluate_pairs_as_one_does(recipe: Recipe, tmp_path: Path) -> None:
    common = (*recipe.offline, "training.eval_interval=2", "training.save_interval=2")
    held_out = (f"eval.data_path={recipe.folder / 'pairs.jsonl'}", "training.global_batch_size=3")  # batches of 3 and 1
    succeed(recipe.run(tmp_path / "trained", "runtime=local", *common, *held_out))
    two = ("actor_rollout.num_gpus_for_train=2", "resource_pool.actor_rollout=2")
    succeed(recipe.run(tmp_path / "ray", *common, *held_out, *two, *only(tmp_path / "trained" / "checkpoints")))
    mine, theirs = row(tmp_path / "ray", 2), row(tmp_path / "trained", 2)
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert theirs["eval/rewards/margins"] != 0
