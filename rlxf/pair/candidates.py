"""Pairs of completions that a pairing may choose from, made from scores or from a judge's verdicts. Pure functions.

Everything here is sorted by prompt and sample index first, so that the order of the rows changes nothing. Candidates
are sorted by prompt and then by their two sample indices, the smaller one first; a tie has a margin of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.pairs import PairedRows
from rlxf.core.types import Comparisons, Rollouts, ScoredRollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class Extremes:
    """Best and worst completion of each of ``P`` prompts. Among equal scores the smallest sample index counts."""

    best: Tensor  # [P] int64, rows of the rollouts; meaningless where ``missing``
    worst: Tensor  # [P] int64
    margin: Tensor  # [P] float32; NaN where ``missing``
    missing: Tensor  # [P] bool: fewer than two completions have a score

    @property
    def num_ties(self) -> int:
        return int((self.margin.numpy() == 0).sum())  # false for NaN

    @property
    def num_missing(self) -> int:
        return int(self.missing.numpy().sum())

    def candidates(self, rollouts: Rollouts) -> PairedRows:
        """Best against worst of each prompt that has both."""
        pairs = PairedRows(rollouts=rollouts, chosen=self.best, rejected=self.worst, margin=self.margin)
        return pairs.where(torch.from_numpy(~self.missing.numpy()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """A judge's ``M`` comparisons in the order of candidates: of each, the completion with the smaller sample index and
    the other one, as places in ``by_prompt_and_sample``.
    """

    order: Tensor  # [B] int64, row of the rollouts at each place
    low: Tensor  # [M] int64, places
    high: Tensor  # [M] int64
    low_wins: Tensor  # [M] float64, probability that ``low`` is better; NaN: no verdict

    @property
    def margin(self) -> Tensor:
        """[M] float64 ``|2 p - 1|``, NaN without a verdict."""
        return (2 * self.low_wins - 1).abs()

    def candidates(self, rollouts: Rollouts) -> PairedRows:
        """The comparisons with a verdict: the better side is chosen."""
        known = ~self.low_wins.isnan()
        low, high, low_wins = self.low[known], self.high[known], self.low_wins[known]
        return PairedRows(
            rollouts=rollouts,
            chosen=self.order[torch.where(low_wins >= 0.5, low, high)],
            rejected=self.order[torch.where(low_wins >= 0.5, high, low)],
            margin=self.margin[known].float(),
        )


def by_prompt_and_sample(rollouts: Rollouts) -> Tensor:
    """[B] int64: the rows, sorted by prompt and then by sample index."""
    # Here and below by numpy for the reason of ``take``: a chunk has few rows.
    order = np.lexsort((rollouts.sample_index.numpy(), rollouts.prompt_index.numpy()))
    prompt, sample = rollouts.prompt_index.numpy()[order], rollouts.sample_index.numpy()[order]
    twice = (prompt[1:] == prompt[:-1]) & (sample[1:] == sample[:-1])
    if twice.any():
        row = int(twice.argmax())
        raise ShapeError(f"sample {sample[row]} of prompt row {prompt[row]} occurs more than once")
    return torch.from_numpy(order)


def extremes(scored: ScoredRollouts) -> Extremes:
    """Best and worst of each prompt."""
    rollouts, num_prompts = scored.rollouts, len(scored.rollouts.prompts)
    order = by_prompt_and_sample(rollouts).numpy()
    prompt, scores = rollouts.prompt_index.numpy()[order], scored.scores.numpy()[order]  # [B]
    margin = np.full(num_prompts, math.nan, np.float32)
    missing = np.bincount(prompt[~np.isnan(scores)], minlength=num_prompts) < 2  # [P]
    if not len(order):  # prompts without any completion
        best = worst = np.zeros(num_prompts, np.int64)
    else:
        counts = np.bincount(prompt, minlength=num_prompts)
        first = np.minimum(counts.cumsum() - counts, len(order) - 1)  # place of each prompt's first completion
        # Stable sorts, which put NaN last: among equal scores the smallest sample index stands first.
        best, worst = (order[np.lexsort((keys, prompt))[first]] for keys in (-scores, scores))
        found = scored.scores.numpy()
        margin[~missing] = found[best[~missing]] - found[worst[~missing]]
    return Extremes(
        best=torch.from_numpy(best),
        worst=torch.from_numpy(worst),
        margin=torch.from_numpy(margin),
        missing=torch.from_numpy(missing),
    )


def scored_pairs(scored: ScoredRollouts) -> PairedRows:
    """Every two completions of a prompt that have scores: the one with the higher score is chosen."""
    rollouts = scored.rollouts
    order = by_prompt_and_sample(rollouts)
    order = order[~scored.scores[order].isnan()]
    prompt = rollouts.prompt_index[order]
    largest = int(prompt.bincount().max()) if len(prompt) else 0
    found = [(torch.zeros(0, dtype=torch.int64),) * 2]
    for distance in range(1, largest):  # places of one prompt stand together
        low = (prompt[distance:] == prompt[:-distance]).nonzero().flatten()
        found.append((low, low + distance))
    low, high = (torch.cat(side) for side in zip(*found, strict=True))
    sort = torch.from_numpy(np.lexsort((high.numpy(), low.numpy())))
    low, high = order[low[sort]], order[high[sort]]
    low_is_better = scored.scores[low] >= scored.scores[high]
    chosen, rejected = torch.where(low_is_better, low, high), torch.where(low_is_better, high, low)
    margin = scored.scores[chosen] - scored.scores[rejected]
    return PairedRows(rollouts=rollouts, chosen=chosen, rejected=rejected, margin=margin)


def verdicts_of(rollouts: Rollouts, comparisons: Comparisons) -> Verdicts:
    """The comparisons, sorted.

    Raises:
        ShapeError: a row is not there, two rows are of different prompts, or two rows were compared twice.
    """
    order = by_prompt_and_sample(rollouts)
    rows = torch.cat([comparisons.first, comparisons.second])
    outside = rows[(rows < 0) | (rows >= len(rollouts))]
    if len(outside):
        raise ShapeError(f"a comparison is of row {int(outside[0])}, but there are {len(rollouts)} completions")
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first, second = place[comparisons.first], place[comparisons.second]
    apart = rollouts.prompt_index[comparisons.first] != rollouts.prompt_index[comparisons.second]
    if bool((apart | (first == second)).any()):
        row = int((apart | (first == second)).nonzero()[0])
        raise ShapeError(
            f"comparison {row} is of rows {int(comparisons.first[row])} and {int(comparisons.second[row])}: expected "
            "two completions of one prompt"
        )
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    probability = comparisons.probability.double()
    low_wins = torch.where(first < second, probability, 1 - probability)
    sort = torch.from_numpy(np.lexsort((high.numpy(), low.numpy())))
    low, high, low_wins = low[sort], high[sort], low_wins[sort]
    if bool(((low[1:] == low[:-1]) & (high[1:] == high[:-1])).any()):
        raise ShapeError("two completions were compared more than once")
    return Verdicts(order=order, low=low, high=high, low_wins=low_wins)
