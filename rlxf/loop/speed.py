"""How fast a run is, as far as its loop knows."""

from __future__ import annotations

from typing import Protocol

from rlxf.core.types import Metrics


class Speed(Protocol):
    """``speed/*`` and ``plan/*`` of the row of step ``step`` (1 is the first), from its other metrics.

    It raises nothing, and takes milliseconds at most: the driver waits for it.
    """

    def __call__(self, step: int, row: Metrics) -> Metrics: ...


def no_speed(step: int, row: Metrics) -> Metrics:
    """For a run without a plan."""
    return {}
