"""On given rollouts, how they are laid out decides nothing: not the pairs, not the loss, not the gradients."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.data_world import write_rows
from tests.runs.small import Finished, Recipe, World, replay_of, run
from tests.tiny_models import EOS

NUM_STEPS, STEP_SIZE = 3, 8
# One optimizer step per driver step, and a rate at which AdamW does not turn rounding into another path.
PENALTY = 0.5
ACTOR = {"ppo_mini_batch_size": STEP_SIZE, "micro_batch_size": STEP_SIZE, "missing_eos_penalty": PENALTY, "lr": 1e-5}
# Relative, or absolute where a difference of two log-probs of 60 nats is reported: fp32 has steps of 4e-6 there.
CLOSE = {
    "loss": (1e-6, 0.0), "grad_norm": (1e-6, 0.0), "logps/chosen": (1e-6, 0.0), "logps/rejected": (1e-6, 0.0),
    "pair/margin": (1e-6, 0.0), "objective/scores": (1e-6, 0.0), "objective/kl": (0.0, 4e-6),
    "rewards/margins": (0.0, 4e-6),
}  # fmt: skip


def recorded_rows() -> list[dict[str, Any]]:
    """Prompts with two to four completions; some scores tie, some are missing, some completions have no EOS."""
    draw = random.Random(7)

    def ids(low: int, high: int) -> list[int]:
        return draw.choices(range(70, 250), k=draw.randint(low, high))

    return [
        {
            "prompt_ids": ids(3, 10),
            "completions": [
                {"token_ids": ids(1, 14) + [EOS] * draw.randint(0, 1), "score": draw.choice([0, 0.5, 1.25, 2, None])}
                for _ in range(draw.randint(2, 4))
            ],
            "policy_version": number // STEP_SIZE,
        }
        for number in range(NUM_STEPS * STEP_SIZE)
    ]


def replay(world: World, rows: list[dict[str, Any]], folder: Path, **actor: Any) -> Finished:
    recipe: Recipe = world.recipe(
        actor_rollout={**ACTOR, **actor},
        training={"global_batch_size": STEP_SIZE, "train_iters": NUM_STEPS},
        log={"tensorboard": False, "samples_interval": 1},
        reward={"model": None, "load": None},
    )
    return run(replay_of(recipe, write_rows(folder / "rows.jsonl", rows)), folder / "run")


def pairs_of(finished: Finished) -> list[tuple[Any, ...]]:
    """The pairs of each step, in an order of their own."""
    table = read_jsonl(finished.folder / "samples.jsonl")
    return sorted(tuple(row.values()) for row in table)


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return replay(world, recorded_rows(), tmp_path_factory.mktemp("plain"))


def assert_same(found: Finished, expected: Finished) -> None:
    assert pairs_of(found) == pairs_of(expected)
    for mine, other in zip(found.rows, expected.rows, strict=True):
        for name, (relative, absolute) in CLOSE.items():
            assert mine[name] == pytest.approx(other[name], rel=relative, abs=absolute), (mine["step"], name)


def test_the_given_rollouts_hold_pairs_ties_and_missing_scores(plain: Finished) -> None:
    assert all(0 < row["pair/kept"] < STEP_SIZE for row in plain.rows)
    assert sum(row["pair/tie_rate"] for row in plain.rows) > 0
    assert any(row["pair/dropped"] > STEP_SIZE * row["pair/tie_rate"] for row in plain.rows)
    assert len(pairs_of(plain)) == sum(row["pair/kept"] for row in plain.rows)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_a_steps_rows_changes_nothing(world: World, plain: Finished, tmp_path: Path, seed: int) -> None:
    rows, draw = recorded_rows(), random.Random(seed)
    steps = [rows[start : start + STEP_SIZE] for start in range(0, len(rows), STEP_SIZE)]
    mixed = [row for step in steps for row in draw.sample(step, len(step))]
    assert mixed != rows
    assert_same(replay(world, mixed, tmp_path), plain)


@pytest.mark.parametrize("size", [1, 3])
def test_the_micro_batch_size_changes_nothing(world: World, plain: Finished, tmp_path: Path, size: int) -> None:
    assert_same(replay(world, recorded_rows(), tmp_path, micro_batch_size=size), plain)


def test_what_gives_no_pair_is_not_trained_on(world: World, plain: Finished, tmp_path: Path) -> None:
    rows = recorded_rows()
    for row in rows:
        scored = [completion for completion in row["completions"] if completion["score"] is not None]
        if len({c["score"] - PENALTY * (c["token_ids"][-1] != EOS) for c in scored}) < 2:
            row["completions"] = [{"token_ids": [99, 98, 97], "score": None}] * 2
    assert rows != recorded_rows()
    found = replay(world, rows, tmp_path)
    assert found.losses == plain.losses
    assert all(tensor.equal(found.weights[name]) for name, tensor in plain.weights.items())
