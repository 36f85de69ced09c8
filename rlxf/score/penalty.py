"""From raw scores to the scores that pairs are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from rlxf.core.errors import ShapeError, TrainingError
from rlxf.core.types import Rollouts, ScoredRollouts, Sequences


def with_scores(
    rollouts: Rollouts,
    raw_scores: Tensor,
    *,
    eos_ids: Collection[int],
    missing_eos_penalty: float,
    stopped: Callable[[Sequences], Tensor] | None = None,
) -> ScoredRollouts:
    """Rollouts with their scores, lower by ``missing_eos_penalty`` where a completion has no end.

    Args:
        rollouts: B completions.
        raw_scores: [B] float32, NaN where a score is missing (it stays NaN).
        eos_ids: every id that ends a completion.
        missing_eos_penalty: subtracted from the score.
        stopped: [B] bool: which completions end with a stop string, an end as good as an EOS.

    Raises:
        TrainingError: a score is infinite.
    """
    if raw_scores.shape != (len(rollouts),):
        raise ShapeError(f"{len(rollouts)} completions, but scores of shape {tuple(raw_scores.shape)}")
    raw_scores = raw_scores.to(torch.float32)
    infinite = raw_scores.isinf().nonzero().flatten().tolist()
    if infinite:
        row = infinite[0]
        prompt_id = int(rollouts.prompts.row_ids[rollouts.prompt_index[row]])
        raise TrainingError(
            f"{len(infinite)} of {len(rollouts)} scores are infinite, the first one that of prompt {prompt_id}, sample "
            f"{int(rollouts.sample_index[row])}; a scorer must give finite scores, or NaN where it has none"
        )
    contains_eos = _ends_with(rollouts.sequences, eos_ids)
    if stopped is not None:
        contains_eos |= stopped(rollouts.sequences)
    scores = torch.where(contains_eos, raw_scores, raw_scores - missing_eos_penalty)
    return ScoredRollouts(rollouts=rollouts, raw_scores=raw_scores, scores=scores, contains_eos=contains_eos)


def _ends_with(sequences: Sequences, ids: Collection[int]) -> Tensor:
    """[B] bool: whether the last token of each completion is one of ``ids``; an empty completion ends with nothing."""
    last = sequences.lengths.cumsum(0) - 1
    wanted = torch.tensor(sorted(ids), dtype=sequences.tokens.dtype)
    return torch.isin(sequences.tokens[last], wanted) & (sequences.completion_lengths > 0)
