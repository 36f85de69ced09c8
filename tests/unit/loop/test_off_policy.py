"""What the loop tells of completions that older weights have sampled."""

from __future__ import annotations

import pytest

from rlxf.core.types import Metrics, ReferencedPairs
from rlxf.driver import train
from tests.unit.small_run import SmallRun, small_config, small_run


def drifting(small: SmallRun) -> SmallRun:
    """The same run, whose actor says how far the engine's log-probs are from its own."""
    update = small.actor.update

    def report(batch: ReferencedPairs, step: int) -> Metrics:
        drift = {"rollout/logp_diff_mean": 0.1, "rollout/logp_diff_max": 0.2, "offpolicy/ess": 0.9}
        return update(batch, step) | drift

    small.actor.update = report  # type: ignore[method-assign]
    return small


@pytest.mark.parametrize(("lookahead", "expected"), [(0, [True] * 4), (1, [True, False, False, False])])
def test_drift_is_told_only_of_the_weights_that_sampled(lookahead: int, expected: list[bool]) -> None:
    small = drifting(small_run(small_config(rollout__lookahead=lookahead)))
    train(small.run)
    rows = list(small.notes.steps.values())
    assert ["rollout/logp_diff_mean" in row for row in rows] == expected
    assert ["rollout/logp_diff_max" in row for row in rows] == expected
    assert all(row["offpolicy/ess"] == 0.9 for row in rows)
