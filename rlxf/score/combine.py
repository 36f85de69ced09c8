"""From the scores of several sources to one score of each completion. Pure functions, and running moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlxf.config.rewards import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """How one source enters the sum."""

    name: str
    weight: float = 1.0
    scale: Scale = "none"
    leave_out: bool = False  # a missing score: the sum is made of the others; else the completion has no score
    whole_step: bool = False  # it is asked about all completions of a step at once

    @property
    def needs_whole_step(self) -> bool:
        """What the completions of a step add to the sum is known only when all of them are there."""
        return self.whole_step or self.scale != "none"


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, mean and sum of squared deviations of all scores so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_scores(self, scores: Tensor) -> Moments:
        """With the scores of one more step, NaN left out (Chan et al. 1979)."""
        known = scores[~scores.isnan()].double()
        if not len(known):
            return self
        count, mean = len(known), float(known.mean())
        squares = float((known - mean).square().sum())
        total, shift = self.count + count, mean - self.mean
        return Moments(
            total,
            self.mean + shift * count / total,
            self.squares + squares + shift**2 * self.count * count / total,
        )

    @property
    def deviation(self) -> float:
        """The standard deviation (n - 1); NaN of fewer than two scores."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


Running = dict[str, Moments]  # of each source with a running scale, by name


def combine(table: Tensor, terms: Sequence[Term], running: Running) -> Tensor:
    """[B] float32 weighted sums of scaled scores; NaN where a score is missing that may not be left out.

    Args:
        table: [B, S] float32 scores of a whole step, a column for each term; NaN where missing.
        terms: how each column enters the sum.
        running: moments of all steps before this one.
    """
    if len(terms) == 1 and terms[0].scale == "none" and terms[0].weight == 1:
        return torch.from_numpy(table.numpy()[:, 0])  # to the bit; by numpy for the reason of ``take``
    total = torch.zeros(len(table), dtype=torch.float64)
    known, dropped = torch.zeros(len(table), dtype=torch.bool), torch.zeros(len(table), dtype=torch.bool)
    for term, scores in zip(terms, table.double().unbind(1), strict=True):
        there = ~scores.isnan()
        scaled = _scaled(scores, term, running.get(term.name, Moments()))
        total = total + torch.where(there, term.weight * scaled, 0.0)
        known |= there
        dropped |= ~there & (not term.leave_out)
    return torch.where(known & ~dropped, total, math.nan).float()


class RunningScales:
    """Moments of all steps that were scored, in the order of the steps.

    Args:
        terms: of the sum.
        running: moments after the complete steps, as the run's state has them.
    """

    def __init__(self, terms: Sequence[Term], running: Mapping[str, Sequence[float]]) -> None:
        self._terms = terms
        self._now: Running = {name: Moments(int(count), *rest) for name, (count, *rest) in running.items()}

    def add(self, table: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
        """[B] sums of the next step, by the moments of the steps before it; and the moments after it."""
        sums = combine(table, self._terms, self._now)
        self._now = next_running(table, self._terms, self._now)
        return sums, {name: [found.count, found.mean, found.squares] for name, found in self._now.items()}


def unscaled(terms: Sequence[Term]) -> list[Term]:
    """The terms without their scales: for an evaluation, whose sums are compared over the whole run."""
    return [Term(name=term.name, weight=term.weight, leave_out=term.leave_out) for term in terms]


def next_running(table: Tensor, terms: Sequence[Term], running: Running) -> Running:
    """The moments after the step that ``table`` is of."""
    return {
        term.name: running.get(term.name, Moments()).with_scores(scores)
        for term, scores in zip(terms, table.unbind(1), strict=True)
        if term.scale == "running"
    }


def _scaled(scores: Tensor, term: Term, before: Moments) -> Tensor:
    if term.scale == "none":
        return scores
    if term.scale == "rank":
        return _ranks(scores)
    own = Moments().with_scores(scores)
    # Before the first step there is nothing to scale by but the step itself.
    moments = before if term.scale == "running" and before.count > 1 else own
    deviation = moments.deviation
    return (scores - moments.mean) / (deviation if deviation > 0 else 1.0)


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 0 (lowest) to 1; equal scores share the mean of their ranks. One score alone has 0.5."""
    known = ~scores.isnan()
    values, index, counts = torch.unique(scores[known], return_inverse=True, return_counts=True)
    if not len(values):
        return scores
    first = counts.cumsum(0) - counts
    ranks = (first + (counts - 1) / 2)[index]
    size = int(known.sum())
    found = scores.clone()
    found[known] = (ranks / (size - 1) if size > 1 else ranks + 0.5).to(found)
    return found
