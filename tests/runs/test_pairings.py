"""Runs with several pairs of a prompt: killed and typed again they are the undisturbed run, also ahead of training."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from tests.runs.killed import Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Recipe, World
from tests.runs.test_lookahead import UPDATE, recipe_of

KEYS = {
    "all": {"max_pairs_per_prompt": 2, "max_length_ratio": 4.0, "margin_weight": 0.1},
    "random": {},
    "threshold": {"score_threshold": 0.0},
}


def recipe(world: World, pairing: str, lookahead: int) -> Recipe:
    found = recipe_of(world, lookahead, algorithm={"pairing": pairing, **KEYS[pairing]})
    found["training"] = {**found["training"], "train_iters": 6, "eval_interval": 0}
    found["actor_rollout"] = {**found["actor_rollout"], "n_samples_per_prompt": 4, "ppo_mini_batch_size": 3}
    found["log"] = {**found["log"], "samples_interval": 1}
    return found


@pytest.mark.parametrize(
    ("pairing", "lookahead"),
    [
        ("all", 2),
        pytest.param("random", 1, marks=pytest.mark.slow),
        pytest.param("threshold", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_exactly(world: World, tmp_path: Path, pairing: str, lookahead: int) -> None:
    made = recipe(world, pairing, lookahead)
    whole = undisturbed_run(made, tmp_path / "whole")
    kept = [row["pair/kept"] for row in whole.rows]
    assert pairing == "random" or max(kept) > made["training"]["global_batch_size"]
    ended = run_in_child(made, tmp_path / "run", Call(UPDATE, 4))
    assert ended.code == -signal.SIGKILL, ended.output
    assert len(load_waiting(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])) == lookahead
    ended = run_in_child(made, tmp_path / "run")
    assert ended.code == 0, ended.output
    assert_same_run(tmp_path / "run", whole)
