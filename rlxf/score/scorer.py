"""The scorer's protocol."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rlxf.core.types import Rollouts


class Scorer(Protocol):
    """Gives each completion a score; larger is better."""

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores, one per completion; NaN where a score is missing (it is never replaced by 0).

        Raises:
            ScoreError: the call failed. Then none of its completions has a score, which ``reward.max_failures`` allows
                or not.
        """
        ...
