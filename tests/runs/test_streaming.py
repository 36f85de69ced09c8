"""A step in chunks: the numbers of a step as a whole to float tolerance, of itself to the bit, also after kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.killed import Call, undisturbed_run
from tests.runs.small import Finished, Recipe, World, run
from tests.runs.test_judged_run import judged
from tests.runs.test_kill import assert_survives

STEPS = 4
TOLERANCE = 1e-6
# Scores that depend on one completion alone, a metric of each call, and a value of each completion.
RULE = """
def reward(prompts, completions, completion_ids, log_extra, log_metric, **columns):
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_metric("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return [None if sum(ids) % 11 == 0 else float(sum(ids) % 5) for ids in completion_ids]
"""
# Scores that depend on the other completions of the call.
CONTRAST = """
def reward(prompts, completions, completion_ids, **columns):
    mean = sum(map(len, completion_ids)) / len(completion_ids)
    return [float(len(ids) > mean) for ids in completion_ids]
"""


def several_sources(folder: Path, **contrast: Any) -> dict[str, Any]:
    (folder / "rule.py").write_text(RULE)
    (folder / "contrast.py").write_text(CONTRAST)
    sources = [
        {"name": "rule", "function": str(folder / "rule.py"), "missing": "leave_out"},
        {"name": "contrast", "function": str(folder / "contrast.py"), "weight": 0.5, **contrast},
    ]
    return {"load": None, "model": None, "sources": sources, "workers": 1}


def recipe_of(world: World, chunk: int | None, **changes: dict[str, Any]) -> Recipe:
    rollout = {"stream_prompts": chunk, **changes.pop("rollout", {})}
    training = {"train_iters": STEPS, "global_batch_size": 6, **changes.pop("training", {})}
    log = {"rollouts": True, "samples_interval": 1, "tensorboard": False}
    return world.recipe(rollout=rollout, training=training, log=log, **changes)


def assert_near(one: Finished, other: Finished) -> None:
    """The same samples and scores, and losses to float tolerance."""
    assert [row["completions"] for row in one.rollouts] == [row["completions"] for row in other.rollouts]
    assert one.losses == pytest.approx(other.losses, abs=TOLERANCE)
    for mine, theirs in zip(one.numbers, other.numbers, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_chunks_give_what_the_whole_step_gives(world: World, tmp_path: Path, pairing: str, chunk: int) -> None:
    algorithm, actor = {"pairing": pairing}, {"ppo_mini_batch_size": 2}
    whole = run(recipe_of(world, None, algorithm=algorithm, actor_rollout=actor), tmp_path / "whole")
    chunks = run(recipe_of(world, chunk, algorithm=algorithm, actor_rollout=actor), tmp_path / "chunks")
    assert_near(chunks, whole)


def test_sources_of_chunks_and_of_the_whole_step(world: World, tmp_path: Path) -> None:
    """What one source says of a chunk, another one of the whole step, with the metrics and columns that they log."""
    reward = several_sources(tmp_path, whole_step=True)
    whole = run(recipe_of(world, None, reward=reward), tmp_path / "whole")
    chunks = run(recipe_of(world, 2, reward=reward), tmp_path / "chunks")
    assert_near(chunks, whole)
    again = run(recipe_of(world, 2, reward=reward), tmp_path / "again")
    assert again.numbers == chunks.numbers
    assert again.rollouts == chunks.rollouts
    assert all("rewards/rule/tokens" in row for row in chunks.rows)


def test_a_function_that_compares_needs_the_whole_step(world: World, tmp_path: Path) -> None:
    """Without the key its scores are others: the test above can fail."""
    reward = several_sources(tmp_path)
    whole = run(recipe_of(world, None, reward=reward), tmp_path / "whole")
    chunks = run(recipe_of(world, 1, reward=reward), tmp_path / "chunks")
    means = [[row["rewards/contrast/mean"] for row in done.rows] for done in (whole, chunks)]
    assert means[0] != means[1]


def test_a_judge_compares_chunk_by_chunk(world: World, tmp_path: Path) -> None:
    whole = run(judged(world, tmp_path), tmp_path / "whole")
    chunks = run(judged(world, tmp_path, rollout={"lookahead": 1, "stream_prompts": 1}), tmp_path / "chunks")
    assert chunks.losses == pytest.approx(whole.losses, abs=TOLERANCE)
    for mine, theirs in zip(chunks.rows, whole.rows, strict=True):
        names = [name for name in theirs if name.startswith("judge/")]
        assert names
        assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, 1])
def test_killed_in_the_middle_of_chunks(world: World, tmp_path: Path, lookahead: int) -> None:
    recipe = recipe_of(
        world,
        2,
        rollout={"lookahead": lookahead},
        training={
            "train_iters": 6,
            "global_batch_size": 4,
            "save_interval": 2,
            "keep_latest": 2,
            "save_hf_interval": 3,
        },
        actor_rollout={"ppo_mini_batch_size": 2},
    )
    undisturbed = undisturbed_run(recipe, tmp_path / "undisturbed")
    scoring, reference = "rlxf.algorithms.scoring:Scoring", "rlxf.reference.frozen:FrozenReference"
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call("rlxf.rollout.session:RequestSession.advance", 4),
        Call(f"{scoring}.ask", 5),
        Call(f"{scoring}.ask", 8, after=True),
        Call(f"{reference}.logps", 2, after=True),
        Call(f"{scoring}.finish", 1),
        Call("rlxf.update.actor:MegatronActor.update", 2),
    )
