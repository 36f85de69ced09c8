"""From scored completions to preference pairs. Pure functions: no device, no model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.types import OnlinePairs, PairingResult, Rollouts, ScoredRollouts


def best_worst(scored: ScoredRollouts, *, min_score_margin: float) -> PairingResult:
    """Best against worst completion of each prompt.

    Among equal scores the smallest sample index counts, so the order of the rows changes nothing. A completion without
    a score is never chosen nor rejected.

    Args:
        scored: completions with scores; NaN marks a missing one.
        min_score_margin: a pair is dropped unless its margin is larger; 0 drops ties only.
    """
    rollouts = scored.rollouts
    order = _by_prompt_and_sample(rollouts)
    prompt, scores = rollouts.prompt_index[order], scored.scores[order]  # [B]
    num_prompts = len(rollouts.prompts)
    best = _first_extreme(scores, prompt, num_prompts)
    worst = _first_extreme(-scores, prompt, num_prompts)

    num_scored = prompt[~scores.isnan()].bincount(minlength=num_prompts)  # [P]
    missing = num_scored < 2
    margin = torch.full((num_prompts,), math.nan)
    margin[~missing] = scores[best[~missing]] - scores[worst[~missing]]
    kept = margin > min_score_margin  # false for NaN
    chosen_rows, rejected_rows = order[best[kept]], order[worst[kept]]
    return PairingResult(
        pairs=_pairs(rollouts, chosen_rows, rejected_rows, margin[kept]),
        chosen_rows=chosen_rows,
        rejected_rows=rejected_rows,
        dropped=num_prompts - int(kept.sum()),
        ties=int((margin == 0).sum()),
        missing=int(missing.sum()),
        num_prompts=num_prompts,
    )


def _by_prompt_and_sample(rollouts: Rollouts) -> Tensor:
    """[B] int64: the rows, sorted by prompt and then by sample index."""
    by_sample = torch.argsort(rollouts.sample_index, stable=True)
    order = by_sample[torch.argsort(rollouts.prompt_index[by_sample], stable=True)]
    prompt, sample = rollouts.prompt_index[order], rollouts.sample_index[order]
    twice = (prompt[1:] == prompt[:-1]) & (sample[1:] == sample[:-1])
    if twice.any():
        row = int(twice.nonzero()[0])
        raise ShapeError(f"sample {int(sample[row])} of prompt row {int(prompt[row])} occurs more than once")
    return order


def _first_extreme(scores: Tensor, prompt: Tensor, num_prompts: int) -> Tensor:
    """[P] int64: of each prompt the first row with its largest score; meaningless where a prompt has no score."""
    known = ~scores.isnan()
    position = torch.arange(len(scores))
    largest = torch.full((num_prompts,), -math.inf).scatter_reduce(0, prompt[known], scores[known], "amax")
    is_largest = known & (scores == largest[prompt])
    first = torch.zeros(num_prompts, dtype=torch.int64)
    return first.scatter_reduce(0, prompt[is_largest], position[is_largest], "amin", include_self=False)


def _pairs(rollouts: Rollouts, chosen_rows: Tensor, rejected_rows: Tensor, margin: Tensor) -> OnlinePairs:
    chosen, rejected = rollouts.sequences.select(chosen_rows), rollouts.sequences.select(rejected_rows)
    if chosen.prompt_rows() != rejected.prompt_rows():
        raise ShapeError("two completions of one prompt row do not start with the same prompt tokens")
    by_row = torch.split(rollouts.engine_logps, rollouts.sequences.completion_lengths.tolist())

    def engine_logps(rows: Tensor) -> Tensor:
        picked = [by_row[row] for row in rows.tolist()]
        return torch.cat(picked) if picked else rollouts.engine_logps.new_empty(0)

    return OnlinePairs(
        chosen=chosen,
        rejected=rejected,
        row_ids=rollouts.prompts.row_ids[rollouts.prompt_index[chosen_rows]],
        margin=margin,
        policy_version=torch.minimum(rollouts.policy_version[chosen_rows], rollouts.policy_version[rejected_rows]),
        chosen_engine_logps=engine_logps(chosen_rows),
        rejected_engine_logps=engine_logps(rejected_rows),
    )
