"""Each step is told the beta of the epoch that it begins in, also when a run goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.core.types import Metrics, ReferencedPairs
from rlxf.driver import train
from tests.unit.small_run import SmallRun, resume_small, small_config, small_run

BETAS = [0.3, 0.2, 0.1]  # an epoch of small_run is two steps
EXPECTED = [0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]


def config(**changes: Any) -> Any:
    keys = {"training__train_iters": 8, "training__save_interval": 3, "actor_rollout__dpo_beta": BETAS}
    return small_config(**keys | changes)


def told(small: SmallRun) -> list[float | None]:
    """Trains; the beta of each update."""
    found: list[float | None] = []
    update = small.actor.update

    def noting(batch: ReferencedPairs, step: int) -> Metrics:
        found.append(batch.beta)
        return update(batch, step)

    small.actor.update = noting  # type: ignore[method-assign]
    train(small.run)
    return found


@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_step_is_told_the_beta_of_its_epoch(lookahead: int) -> None:
    assert told(small_run(config(rollout__lookahead=lookahead))) == EXPECTED
    assert told(small_run(config(actor_rollout__dpo_beta=0.4, rollout__lookahead=lookahead))) == [0.4] * 8


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_resumed_run_goes_on_with_the_same_betas(tmp_path: Path, lookahead: int, steps: int) -> None:
    keys = {"rollout__lookahead": lookahead, "training__save_interval": 1}
    first = small_run(config(**keys, training__train_iters=steps), root=tmp_path)
    assert told(first) == EXPECTED[:steps]
    assert told(resume_small(first, config(**keys))) == EXPECTED[steps:]
