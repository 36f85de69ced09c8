"""Runs on Ray whose prompts move on in chunks: the numbers of one process, whoever is late, is lost or ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Recipe
from tests.cluster.faults import Fault
from tests.cluster.test_recovery import COMMON, TWO_ENGINES, assert_same, events, faulty, made_once

pytestmark = pytest.mark.cluster

# Four prompts a step; an optimizer step for each half of their pairs.
CHUNKS = (*COMMON, "rollout.stream_prompts=1", "actor_rollout.ppo_mini_batch_size=2")


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run without a fault, in one process, made once."""
    return made_once(recipe, tmp_path_factory.mktemp("undisturbed"), CHUNKS)


LATE = (
    Fault(role="infer", rank=0, method="start", call=3, how="rest"),
    Fault(role="infer", rank=0, method="advance", call=6, how="rest"),
    Fault(role="reward", method="score", call=10, how="rest"),
    Fault(role="reward", method="score", call=21, how="rest"),
    Fault(role="ref", method="logps", call=9, how="rest"),
    Fault(role="train", method="update", call=4, how="rest"),
)
STATELESS = (
    Fault(role="infer", method="start", call=2),
    Fault(role="infer", method="advance", call=3),  # in the middle of a step, some of whose chunks are scored
    Fault(role="infer", method="advance", call=8, after=True),
    Fault(role="reward", method="score", call=10),
    Fault(role="ref", method="logps", call=7, after=True),
)
TRAINER = (
    Fault(role="train", method="update", call=2),
    Fault(role="train", method="update", call=7, after=True),
    Fault(role="train", method="send_bucket", call=12),
)


@pytest.mark.timeout(600)
def test_workers_that_are_late_change_no_number(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    ahead = "rollout.lookahead=1"
    faulty(recipe, tmp_path, LATE, *CHUNKS, ahead, "resilience.min_deadline_s=60")
    assert_same(tmp_path / "run", undisturbed(ahead))
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("faults", [STATELESS, TRAINER], ids=["stateless", "trainer"])
def test_workers_that_are_lost_in_the_middle_of_chunks_change_no_number(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int, faults: tuple[Fault, ...]
) -> None:
    ahead = f"rollout.lookahead={lookahead}"
    faulty(recipe, tmp_path, faults, *CHUNKS, ahead)
    assert_same(tmp_path / "run", undisturbed(ahead))
    assert len(events(tmp_path / "run", "recovered", "rebuilt")) >= len(faults)


@pytest.mark.slow
@pytest.mark.timeout(600)
# The four prompts are all under way with the first calls, and an engine that takes from a queue is asked no further.
@pytest.mark.parametrize(("dispatch", "call"), [("planned", "advance"), ("queue", "start")])
def test_another_engine_samples_what_a_lost_one_had_not_handed_over(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, dispatch: str, call: str
) -> None:
    faults = (
        Fault(role="infer", rank=1, method="start", call=3),
        Fault(role="infer", rank=0, method=call, call=6, after=True),
        Fault(role="infer", rank=1, method="start", call=5, how="rest"),
    )
    faulty(recipe, tmp_path, faults, *CHUNKS, *TWO_ENGINES, f"rollout.dispatch={dispatch}")
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    expected = [row["loss"] for row in read_jsonl(undisturbed() / "metrics.jsonl")]
    assert losses == pytest.approx(expected, abs=1e-6)
    assert len(events(tmp_path / "run", "recovered")) == 2
