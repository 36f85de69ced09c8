"""From raw scores to the scores that pairs are made of: penalties for a missing EOS and for length."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlxf.config.roles import SamplingConfig
from rlxf.core.errors import ShapeError, TrainingError
from rlxf.core.types import Rollouts, ScoredRollouts, Sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class Shaping:
    """What is subtracted from a raw score. The defaults subtract nothing."""

    missing_eos_penalty: float = 0.0  # from a completion that does not end with an EOS
    length_penalty: float = 0.0  # for each token of a completion, its EOS included
    overlong_tokens: int = 0  # the last tokens before max_new_tokens, over which overlong_penalty comes in
    overlong_penalty: float = 0.0  # from a completion of max_new_tokens
    max_new_tokens: int = 0  # longest completion; read only with overlong_tokens

    @classmethod
    def of(cls, config: SamplingConfig, *, max_new_tokens: int) -> Shaping:
        """Of a recipe's ``actor_rollout``; ``max_new_tokens`` as the run resolves it."""
        return cls(
            missing_eos_penalty=config.missing_eos_penalty,
            length_penalty=config.length_penalty,
            overlong_tokens=config.overlong_tokens,
            overlong_penalty=config.overlong_penalty,
            max_new_tokens=max_new_tokens,
        )

    @property
    def changes_scores(self) -> bool:
        return self.missing_eos_penalty > 0 or self.length_penalty > 0 or self.overlong_penalty > 0

    def for_length(self, lengths: Tensor) -> Tensor:
        """What completions of these lengths lose, [B] float32.

        The soft penalty is DAPO's (Yu et al. 2025, eq. 13), times ``overlong_penalty``: 0 up to ``max_new_tokens`` -
        ``overlong_tokens``, then linear, in full from ``max_new_tokens`` on.
        """
        loss = self.length_penalty * lengths.to(torch.float32)
        if self.overlong_tokens:
            start = self.max_new_tokens - self.overlong_tokens
            share = (lengths - start).clamp(0, self.overlong_tokens).to(torch.float32) / self.overlong_tokens
            loss = loss + self.overlong_penalty * share
        return loss


def with_scores(
    rollouts: Rollouts,
    raw_scores: Tensor,
    *,
    eos_ids: Collection[int],
    shaping: Shaping,
    stopped: Callable[[Sequences], Tensor] | None = None,
) -> ScoredRollouts:
    """Rollouts with their scores: the raw scores, lower by what ``shaping`` says.

    Args:
        rollouts: B completions.
        raw_scores: [B] float32, NaN where a score is missing (it stays NaN).
        eos_ids: every id that ends a completion.
        shaping: the penalties.
        stopped: [B] bool: which completions end with a stop string, an end as good as an EOS.

    Raises:
        TrainingError: a score is infinite.
    """
    if raw_scores.shape != (len(rollouts),):
        raise ShapeError(f"{len(rollouts)} completions, but scores of shape {tuple(raw_scores.shape)}")
    raw_scores = raw_scores.to(torch.float32)
    infinite = np.flatnonzero(np.isinf(raw_scores.numpy())).tolist()
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
    scores = raw_scores
    if shaping.missing_eos_penalty:
        scores = torch.where(contains_eos, raw_scores, raw_scores - shaping.missing_eos_penalty)
    if shaping.length_penalty or shaping.overlong_tokens:
        scores = scores - shaping.for_length(rollouts.sequences.completion_lengths)
    return ScoredRollouts(rollouts=rollouts, raw_scores=raw_scores, scores=scores, contains_eos=contains_eos)


def _ends_with(sequences: Sequences, ids: Collection[int]) -> Tensor:
    """[B] bool: whether the last token of each completion is one of ``ids``; an empty completion ends with nothing."""
    last = sequences.tokens.numpy()[sequences.lengths.numpy().cumsum() - 1]
    found = np.zeros(len(last), dtype=bool)
    for each in ids:  # few; np.isin takes ten times as long for a chunk
        found |= last == each
    return torch.from_numpy(found & (sequences.completion_lengths.numpy() > 0))
