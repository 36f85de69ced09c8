"""Calls of the scorer that fail: a limited number of completions of a run may stay without a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlxf.core.errors import ScoreError
from rlxf.core.types import Rollouts
from rlxf.score.scorer import Scorer

log = logging.getLogger(__name__)


class Tally(Protocol):
    """Completions of a run that have no score because a call failed; a resumed run continues the count."""

    @property
    def num_failures(self) -> int: ...

    def add_failures(self, count: int) -> None: ...


class FailureLimit:
    """A scorer whose failed calls leave their completions without a score, up to a number of them in the whole run.

    Args:
        scorer: raises ScoreError for the completions of a whole call.
        tally: counts them, for all scorers of the run.
        limit: ``reward.max_failures``.
        place: where the run is, for messages: "step 3".
    """

    def __init__(self, scorer: Scorer, tally: Tally, limit: int, place: Callable[[], str]) -> None:
        self._scorer = scorer
        self._tally = tally
        self._limit = limit
        self._place = place

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores; all of them NaN if the call failed.

        Raises:
            ScoreError: it failed, and with these completions more than ``limit`` would have no score.
        """
        try:
            return self._scorer.score(rollouts)
        except ScoreError as error:
            count = self._tally.num_failures + len(rollouts)
            if count > self._limit:
                raise ScoreError(
                    f"{self._place()}: {error}; {len(rollouts)} completions have no score, {count} in this run, "
                    f"and reward.max_failures = {self._limit} allows fewer"
                ) from error
            self._tally.add_failures(len(rollouts))
            log.warning(
                "%s: %s; %d completions have no score, %d of reward.max_failures = %d in this run",
                self._place(), error, len(rollouts), count, self._limit,
            )  # fmt: skip
            return torch.full((len(rollouts),), math.nan)
