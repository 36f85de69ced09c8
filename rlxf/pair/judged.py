"""Best against worst by a judge's verdicts. Pure functions.

What is compared of a prompt's ``n`` completions decides which of two rules holds:

- **All** ``n (n - 1) / 2`` pairs: best and worst are those with the highest and the lowest mean win probability over
  their verdicts. The prompt gives this pair if the judge prefers the best one there, too; without that verdict, or
  against it, it gives none.
- **Fewer**, such as a knockout of ``n - 1``: the winner is the completion that lost nothing and won most. It is chosen,
  and rejected is, of those that it beat, the one that it beat by the largest margin. Only if a verdict of the knockout
  is a tie or missing, several completions lost nothing and won as often; then the larger margin decides between them.

What is still equal is decided by the smallest sample index. With two completions both rules are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from rlxf.core.pairs import PairedRows
from rlxf.core.types import Rollouts
from rlxf.pair.candidates import Verdicts


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Of two completions of a prompt, by their places in ``Verdicts.order``."""

    low: int
    high: int
    low_wins: float

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.low_wins)

    @property
    def margin(self) -> float:
        return abs(2 * self.low_wins - 1)

    @property
    def winner(self) -> int:
        return self.low if self.low_wins > 0.5 else self.high

    @property
    def loser(self) -> int:
        return self.high if self.low_wins > 0.5 else self.low


def best_against_worst(rollouts: Rollouts, verdicts: Verdicts) -> PairedRows:
    """At most one pair of each prompt."""
    num_completions = rollouts.prompt_index.bincount(minlength=len(rollouts.prompts)).tolist()
    prompts = rollouts.prompt_index[verdicts.order[verdicts.low]].tolist()
    rows = zip(prompts, verdicts.low.tolist(), verdicts.high.tolist(), verdicts.low_wins.tolist(), strict=True)
    found: list[_Verdict] = []
    for prompt, group in groupby(rows, key=lambda row: row[0]):
        asked = [_Verdict(low, high, low_wins) for _, low, high, low_wins in group]
        count = num_completions[prompt]
        rule = _by_mean if len(asked) == count * (count - 1) // 2 else _by_knockout
        pair = rule([verdict for verdict in asked if verdict.is_known])
        found += [pair] if pair is not None else []
    places = torch.tensor([[pair.winner, pair.loser] for pair in found], dtype=torch.int64).reshape(-1, 2)
    margin = torch.tensor([pair.margin for pair in found], dtype=torch.float64).float()
    chosen, rejected = (verdicts.order[places[:, side]] for side in (0, 1))
    return PairedRows(rollouts=rollouts, chosen=chosen, rejected=rejected, margin=margin)


def _by_mean(verdicts: Sequence[_Verdict]) -> _Verdict | None:
    wins: dict[int, list[float]] = {}
    for verdict in verdicts:
        wins.setdefault(verdict.low, []).append(verdict.low_wins)
        wins.setdefault(verdict.high, []).append(1 - verdict.low_wins)
    means = {place: math.fsum(values) / len(values) for place, values in sorted(wins.items())}
    if not means:
        return None
    best, worst = max(means, key=lambda place: means[place]), min(means, key=lambda place: means[place])
    wanted = (verdict for verdict in verdicts if {verdict.low, verdict.high} == {best, worst})
    pair = next(wanted, None)
    return pair if pair is not None and pair.margin > 0 and pair.winner == best else None


def _by_knockout(verdicts: Sequence[_Verdict]) -> _Verdict | None:
    decided = [verdict for verdict in verdicts if verdict.margin > 0]
    losers = {verdict.loser for verdict in decided}
    unbeaten = [verdict for verdict in decided if verdict.winner not in losers]
    winners = [verdict.winner for verdict in unbeaten]
    # Of equals the first of max counts: the smallest places, because verdicts are sorted by them.
    ranked = sorted(unbeaten, key=lambda verdict: (verdict.winner, verdict.loser))
    return max(ranked, key=lambda verdict: (winners.count(verdict.winner), verdict.margin), default=None)
