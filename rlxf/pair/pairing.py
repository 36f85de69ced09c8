"""The pairing's protocol, and the numbers that pairings read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlxf.core.pairs import PairingResult
from rlxf.core.types import Comparisons, ScoredRollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingSettings:
    """What decides which pairs are kept; each pairing reads what it needs."""

    min_score_margin: float = 0.0  # a pair is dropped unless its margin is larger; 0 drops ties only
    max_pairs_per_prompt: int | None = None  # the pairs with the largest margins stay; None: all of them
    max_length_ratio: float | None = (
        None  # a pair whose longer side has more than this many times the tokens is dropped
    )
    threshold: float | None = None  # of `threshold`: above it is good, at or below it is bad
    seed: int = 0  # of `random`
    step: int = 0  # of `random`


class Pairing(Protocol):
    """Makes pairs of completions: a pure function, which the order of the rows does not change."""

    def __call__(
        self, scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
    ) -> PairingResult:
        """The pairs of each prompt, whose weights sum to 1, in the order of prompts and samples.

        Args:
            scored: completions with scores, [B]; NaN marks a missing one, which is never chosen nor rejected.
            settings: which pairs are kept.
            comparisons: a judge's verdicts. With them only judged pairs are made: the better side is chosen, the margin
                is ``|2 p - 1|``, and the scores are not read.

        Two prompts with two completions each, scores ``[2.0, 0.5, 1.0, 1.0]``: ``best_worst`` pairs rows 0 and 1 with
        a margin of 1.5, and drops the second prompt, a tie.
        """
        ...
