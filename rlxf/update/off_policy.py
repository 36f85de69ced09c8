"""How far the policy has moved from the weights that sampled what it trains on: ``offpolicy/*``.

All of it is made of sums, so that micro-batches and ranks can add up theirs. A percentile is no sum. It is read from a
histogram whose points are equally far apart on a logarithmic scale. A value counts for its two neighbouring points, the
more for the nearer one, so that a rounding error never moves a whole count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlxf.core.types import Metrics
from rlxf.models.backend import sum_rows

LOWEST, HIGHEST = 1e-6, 100.0  # nats; what is beyond counts as one of them
PER_DECADE = 32  # points: neighbours are 7.5 % apart
NUM_POINTS = round(math.log10(HIGHEST / LOWEST)) * PER_DECADE + 1
LARGEST = 300.0  # nats of a whole completion; beyond it a square of its weight would leave float64

_SCALARS = ("offpolicy/sum", "offpolicy/tokens", "offpolicy/weights", "offpolicy/squares", "offpolicy/completions")
SUMS = (*_SCALARS, *(f"offpolicy/point_{index}" for index in range(NUM_POINTS)))


def off_policy_sums(log_ratios: Tensor | None, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
    """What ``off_policy_metrics`` needs, of some completions.

    Args:
        log_ratios: [sum of lengths] float64, trainer's minus engine's log-prob of each token, nats; not finite where
            the engine's is unknown. None: all are unknown.
        lengths: [B] int64, tokens of each completion.
        counts: [B] float64, how often each completion counts; None: once.

    Returns:
        [len(SUMS)] float64, all of them sums.
    """
    if log_ratios is None:
        return torch.zeros(len(SUMS), dtype=torch.float64)
    rows = sum_rows(log_ratios, lengths)
    each = torch.ones(len(lengths), dtype=torch.float64) if counts is None else counts
    complete, finite = rows.isfinite(), log_ratios.isfinite()
    weights = rows[complete].clamp(-LARGEST, LARGEST).exp()  # a completion with an unknown token has none
    of_rows, of_tokens = each[complete], each.repeat_interleave(lengths)[finite]
    known = log_ratios[finite]
    by_row, by_token = of_rows * weights, of_tokens * known
    scalars = [by_token.sum(), of_tokens.sum(), by_row.sum(), (by_row * weights).sum(), of_rows.sum()]
    return torch.cat([torch.stack(scalars), _histogram(known.abs(), of_tokens)])


def off_policy_metrics(sums: Tensor) -> Metrics:
    """By the names of docs/metrics.md, from the sums of all ranks; empty if the engine's log-probs are unknown."""
    total, tokens, weights, squares, completions = sums[: len(_SCALARS)].tolist()
    metrics: Metrics = {}
    if tokens:
        metrics["offpolicy/logratio_mean"] = total / tokens
        metrics["offpolicy/logratio_p99"] = _percentile(sums[len(_SCALARS) :], 0.99)
    if completions:
        metrics["offpolicy/ess"] = min(1.0, weights * weights / (completions * squares))
    return metrics


def _histogram(values: Tensor, counts: Tensor) -> Tensor:
    """[NUM_POINTS] float64: each value's count is shared by the two points beside it."""
    places = (values.clamp(LOWEST, HIGHEST) / LOWEST).log10() * PER_DECADE
    left = places.floor().long().clamp(0, NUM_POINTS - 2)
    right_share = places - left
    points = torch.zeros(NUM_POINTS, dtype=torch.float64)
    return points.index_add_(0, left, counts * (1 - right_share)).index_add_(0, left + 1, counts * right_share)


def _percentile(points: Tensor, share: float) -> float:
    """The value that ``share`` of the counts are below; a point's count is spread evenly to half way to the next."""
    counts = points.cumsum(0)
    target = share * float(counts[-1])
    index = min(int(torch.searchsorted(counts, target)), NUM_POINTS - 1)
    inside = (target - float(counts[index] - points[index])) / float(points[index])
    place = min(max(index - 0.5 + inside, 0.0), NUM_POINTS - 1.0)
    return LOWEST * math.pow(10.0, place / PER_DECADE)
