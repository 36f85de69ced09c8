"""The pairing's protocol."""

from __future__ import annotations

from typing import Protocol

from rlxf.core.types import PairingResult, ScoredRollouts


class Pairing(Protocol):
    """Makes pairs of scored completions: a pure function, which the order of the rows does not change."""

    def __call__(self, scored: ScoredRollouts, *, min_score_margin: float) -> PairingResult:
        """At most one pair of each prompt.

        Args:
            scored: completions with scores, [B]; NaN marks a missing one, which is never chosen nor rejected.
            min_score_margin: a pair is dropped unless its margin is larger; 0 drops ties only.

        Two prompts with two completions each, scores ``[2.0, 0.5, 1.0, 1.0]``: ``best_worst`` pairs rows 0 and 1 with
        a margin of 1.5, and drops the second prompt, a tie.
        """
        ...
