"""The scorer's protocol, and what scorers are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rlxf.core.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlxf.config.schema import RunConfig
    from rlxf.platform.base import Platform, Process


class Scorer(Protocol):
    """Gives each completion a score; larger is better.

    Two completions of one prompt, ``rollouts.sequences`` = ``[[5, 6 | 7, 1], [5, 6 | 8]]`` (tokens behind the bar are
    the completion's): ``score`` gives ``tensor([0.8, nan])``, float32, if the second one has no score.
    """

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores, one per completion, on the CPU; NaN where a score is missing (never replaced by 0).

        Raises:
            ScoreError: the call failed. Then none of its completions has a score, which ``reward.max_failures`` allows
                or not.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerParts:
    """What a scorer may be built from; each takes what it needs."""

    config: RunConfig
    platform: Platform
    process: Process
    tokenizer: Callable[[], PreTrainedTokenizerBase]  # loads the policy's
