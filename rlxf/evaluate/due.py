"""The evaluation of runs that evaluate nothing."""

from __future__ import annotations

from rlxf.core.types import Metrics


def no_evaluation(step: int) -> Metrics:
    """For runs that evaluate nothing."""
    return {}
