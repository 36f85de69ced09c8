"""A recipe, a layout and a seed give one run, however often; recorded rollouts give it without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data_world import write_rows
from tests.runs.small import COARSE_REWARD, Finished, Recipe, World, replay_of, run

PENALTY = 0.25
# Of a live run only: what its engine measured, what was pushed into it, and passes over a file that a replay has not.
LIVE_ONLY = (
    *("rollout/", "offpolicy/", "pipeline/", "sync/bytes", "sync/probe_difference", "epoch"),
    *("rewards/reward/", "rewards/recorded/"),  # by the name of the source, which a recording does not have
)


@pytest.fixture(scope="module")
def recipe(world: World, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ties, completions without EOS, two optimizer steps and two passes per step."""
    reward = world.reward_function(tmp_path_factory.mktemp("reward"), COARSE_REWARD)
    actor = {
        "missing_eos_penalty": PENALTY, "n_samples_per_prompt": 2, "ppo_mini_batch_size": 3, "ppo_epochs": 2,
        "shuffle_minibatch": True,
    }  # fmt: skip
    log = {"tensorboard": False, "samples_interval": 0, "rollouts": True}
    return world.recipe(
        reward=reward, actor_rollout=actor, log=log, training={"train_iters": 4, "global_batch_size": 6}
    )


@pytest.fixture(scope="module")
def live(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(recipe, tmp_path_factory.mktemp("runs") / "live")


def same_weights(one: Finished, other: Finished) -> bool:
    assert one.weights.keys() == other.weights.keys()
    return all(one.weights[name].equal(tensor) for name, tensor in other.weights.items())


def without(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(names)} for row in rows]


def test_the_recorded_run_has_ties_and_completions_with_and_without_eos(live: Finished) -> None:
    assert any(row["pair/tie_rate"] > 0 for row in live.rows)
    assert all(row["pair/kept"] > 0 for row in live.rows)
    shares = [row["val/contain_eos_token"] for row in live.rows]
    assert min(shares) > 0
    assert max(shares) < 1
    assert len(set(live.losses)) == 4


def test_the_same_recipe_twice_gives_the_same_bits(recipe: Recipe, live: Finished, tmp_path: Path) -> None:
    again = run(recipe, tmp_path / "again")
    assert again.numbers == live.numbers
    assert same_weights(again, live)
    assert again.rollouts == live.rollouts


def test_another_seed_is_another_run(recipe: Recipe, live: Finished, tmp_path: Path) -> None:
    other = run({**recipe, "training": {**recipe["training"], "seed": 6}}, tmp_path / "other")
    assert other.losses != live.losses


def test_a_replay_without_reward_gives_the_same_bits(recipe: Recipe, live: Finished, tmp_path: Path) -> None:
    values = replay_of(recipe, live.folder / "rollouts.jsonl") | {"reward": {}}
    again = run(values, tmp_path / "again")
    assert without(again.numbers, LIVE_ONLY) == without(live.numbers, LIVE_ONLY)
    assert same_weights(again, live)
    assert again.sampled == live.sampled  # raw scores: the penalty has not been added twice


def test_a_recording_without_scores_is_scored_live(recipe: Recipe, live: Finished, tmp_path: Path) -> None:
    rows = live.rollouts
    for row in rows:
        row["completions"] = [{"token_ids": completion["token_ids"]} for completion in row["completions"]]
    bare = write_rows(tmp_path / "bare.jsonl", rows)
    again = run(replay_of(recipe, bare), tmp_path / "again")
    assert again.losses == live.losses
    assert again.sampled == live.sampled


def test_a_reward_model_scores_a_recording_too(world: World, live: Finished, tmp_path: Path) -> None:
    rows = live.rollouts
    for row in rows:
        for completion in row["completions"]:
            completion["score"] = None
    bare = write_rows(tmp_path / "bare.jsonl", rows)
    values = world.recipe(
        training={"train_iters": 4, "global_batch_size": 6}, log={"tensorboard": False, "rollouts": True}
    )
    scored = run(replay_of(values, bare), tmp_path / "scored")
    found = [completion["score"] for row in scored.rollouts for completion in row["completions"]]
    assert len(set(found)) > len(found) / 2
    assert None not in found
