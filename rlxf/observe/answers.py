"""Numbers about a step's completions that tell of a policy or a reward that goes bad. Names: docs/metrics.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlxf.core.types import Comparisons, Metrics, ScoredRollouts, Sequences


def distinct(sequences: Sequences) -> float:
    """Number of different completions over the number of completions, whatever their prompts; NaN of none.

    Three completions, two of which are the same: 2/3.
    """
    ends = sequences.lengths.cumsum(0)
    starts = ends - sequences.completion_lengths
    tokens, size = sequences.tokens.numpy().tobytes(), sequences.tokens.element_size()
    places = zip((starts * size).tolist(), (ends * size).tolist(), strict=True)
    return len({tokens[start:end] for start, end in places}) / len(sequences) if len(sequences) else math.nan


def score_shape(scored: ScoredRollouts) -> Metrics:
    """How a step's scores are spread, and how they go with length. Missing scores are left out.

    ``score/length_correlation`` is Pearson's, of scores and lengths less the mean of their prompt: pairs are made
    within a prompt, so that how prompts differ does not matter. NaN where either does not vary.
    """
    known = scored.scores.isfinite()
    scores, prompt = scored.scores[known].double(), scored.rollouts.prompt_index[known]
    lengths = scored.rollouts.sequences.completion_lengths[known].double()
    at_max = float((scores == scores.max()).double().mean()) if len(scores) else math.nan
    return {
        "score/std": float(scores.std()) if len(scores) > 1 else math.nan,
        "score/at_max": at_max,
        "score/length_correlation": _correlation(_centred(scores, prompt), _centred(lengths, prompt)),
    }


def judge_agreement(comparisons: Comparisons, scores: Tensor) -> Metrics:
    """Of the verdicts that are no tie and whose scores differ: the share in which the better-scored one won.

    ``scores``: [B] float32, of the completions that were compared. NaN if there is no such verdict.
    """
    better = scores[comparisons.first] - scores[comparisons.second]
    decided = comparisons.probability - 0.5
    counted = better.isfinite() & decided.isfinite() & (better != 0) & (decided != 0)
    agrees = (better[counted] > 0) == (decided[counted] > 0)
    return {"judge/agrees_with_scores": float(agrees.double().mean()) if len(agrees) else math.nan}


def _centred(values: Tensor, group: Tensor) -> Tensor:
    """Values less the mean of their group, float64."""
    if not len(values):
        return values
    counts = group.bincount().clamp_min(1).double()
    means = torch.zeros_like(counts).index_add(0, group, values) / counts
    return values - means[group]


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, of values whose mean is 0. Rounding errors count as no variation."""
    spread = float(one.norm()) * float(other.norm())
    nothing = 1e-9 * max(float(one.numel()), 1.0)
    return float(one @ other) / spread if min(float(one.norm()), float(other.norm())) > nothing else math.nan
