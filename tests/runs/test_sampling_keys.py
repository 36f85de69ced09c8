"""Whole runs with the keys that shape samples, tokens and pairs: resumed and replayed runs are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlxf.assembly.local import launch
from rlxf.config.load import load_config
from rlxf.models.stop_strings import StopStrings
from tests.data_world import chat_tokenizer
from tests.runs.small import Finished, Recipe, World, replay_of, run

STOP = ["a", "e", "xy"]


def recipe_of(world: World, **training: object) -> Recipe:
    """Two epochs of three steps."""
    return world.recipe(
        training={"train_iters": 6, "eval_interval": 3, **training},
        actor_rollout={"dpo_beta": [0.2, 0.1], "ld_alpha": 0.5, "dpo_weighting": "wpo", "missing_eos_penalty": 1.0},
        rollout={"stop": STOP, "min_p": 0.01, "repetition_penalty": 1.3, "lookahead": 1},
        eval={"num_prompts": 4},
        log={"rollouts": True},
    )


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(recipe_of(world), tmp_path_factory.mktemp("keys") / "whole")


def test_completions_end_with_a_stop_string_and_count_as_ended(whole: Finished) -> None:
    stops = StopStrings(chat_tokenizer(), STOP)
    rows = [completion["token_ids"] for row in whole.rollouts for completion in row["completions"]]
    ends = [stops.end(row) for row in rows]
    assert all(end in (None, len(row)) for end, row in zip(ends, rows, strict=True))
    stopped = sum(end is not None for end in ends)
    assert stopped > 0
    assert sum(row["val/contain_eos_token"] for row in whole.rows) * len(rows) / 6 >= stopped


def test_the_metric_shows_the_beta_of_the_step(whole: Finished) -> None:
    assert [row["beta"] for row in whole.rows] == [0.2] * 3 + [0.1] * 3


def test_a_cut_run_without_lookahead_repeats_the_whole_one(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(world)
    recipe["rollout"]["lookahead"] = 0
    expected = run(recipe, tmp_path / "whole")
    short = {**recipe, "training": {**recipe["training"], "train_iters": 4}}
    run(short, tmp_path / "run")
    launch(load_config({"runtime": "local", **recipe}), tmp_path / "run")
    resumed = Finished(tmp_path / "run")
    assert resumed.losses == expected.losses
    assert [row["beta"] for row in resumed.rows] == [0.2] * 3 + [0.1] * 3
    assert all(torch.equal(value, resumed.weights[name]) for name, value in expected.weights.items())


def test_a_replay_makes_the_same_pairs_and_losses(world: World, whole: Finished, tmp_path: Path) -> None:
    recipe = recipe_of(world, eval_interval=0)
    recipe["rollout"]["lookahead"] = 0
    again = run(replay_of(recipe, whole.folder / "rollouts.jsonl"), tmp_path / "replay")
    # A recording of two epochs is one epoch to the replay, so its beta does not change.
    assert again.losses[:3] == whole.losses[:3]
    assert [row["val/contain_eos_token"] for row in again.rows] == [row["val/contain_eos_token"] for row in whole.rows]
