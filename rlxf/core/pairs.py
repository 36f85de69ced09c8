"""Which completions of a step form pairs, before and after their tokens are copied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.tensors import join_slices, take
from rlxf.core.types import OnlinePairs, RolloutPairs, Rollouts, Sequences, select_rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairedRows:
    """``N`` pairs as rows of the rollouts that they are from; nothing is copied yet.

    Of two prompts with two completions each, the second one better both times: ``chosen = [1, 3]``,
    ``rejected = [0, 2]``.
    """

    rollouts: Rollouts
    chosen: Tensor  # [N] int64
    rejected: Tensor  # [N] int64
    margin: Tensor  # [N] float32

    def __len__(self) -> int:
        return self.margin.numel()

    @property
    def prompt_index(self) -> Tensor:
        """[N] int64, row of the rollouts' prompts."""
        return take(self.rollouts.prompt_index, self.chosen)

    def where(self, kept: Tensor) -> PairedRows:
        """Those that ``kept`` marks ([N] bool), or names, in that order ([n] int64)."""
        if kept.dtype == torch.bool:
            if kept.numpy().all():
                return self
            kept = torch.from_numpy(np.flatnonzero(kept.numpy()))  # once, not for each field
        return PairedRows(
            rollouts=self.rollouts,
            chosen=take(self.chosen, kept),
            rejected=take(self.rejected, kept),
            margin=take(self.margin, kept),
        )

    def tokens(self) -> RolloutPairs:
        """What a model reads of the pairs."""
        sequences = self.rollouts.sequences
        return RolloutPairs(
            chosen=sequences.select(self.chosen),
            rejected=sequences.select(self.rejected),
            prompt_index=self.prompt_index,
            chosen_rows=self.chosen,
            rejected_rows=self.rejected,
        )

    def whole(self) -> OnlinePairs:
        """The pairs with all that an update needs of them.

        Raises:
            ShapeError: the two completions of a pair do not start with the same prompt.
        """
        rollouts, plain = self.rollouts, self.tokens()
        if not _same_prompts(plain.chosen, plain.rejected):
            raise ShapeError("two completions of one prompt row do not start with the same prompt tokens")
        lengths, prompts = rollouts.sequences.completion_lengths, plain.prompt_index.numpy()
        counts = np.bincount(prompts, minlength=len(rollouts.prompts)).astype(np.float32)  # pairs of each prompt
        versions = np.minimum(*(take(rollouts.policy_version, rows).numpy() for rows in (self.chosen, self.rejected)))
        return OnlinePairs(
            chosen=plain.chosen,
            rejected=plain.rejected,
            prompt_index=plain.prompt_index,
            chosen_rows=self.chosen,
            rejected_rows=self.rejected,
            row_ids=take(rollouts.prompts.row_ids, plain.prompt_index),
            margin=self.margin,
            policy_version=torch.from_numpy(versions),
            chosen_engine_logps=select_rows(rollouts.engine_logps, lengths, self.chosen),
            rejected_engine_logps=select_rows(rollouts.engine_logps, lengths, self.rejected),
            weight=torch.from_numpy(1 / counts[prompts]),
        )


@dataclass(frozen=True, kw_only=True)
class PairingResult:
    """Pairs, and why other prompts and completions have none."""

    rows: PairedRows  # N, in the order of the prompts
    ties: int  # prompts whose scores are all equal; with a judge, verdicts of 0.5
    missing: int  # prompts of fewer than two scores; with a judge, comparisons without a verdict
    num_asked: int  # what ``ties`` and ``missing`` are of: all prompts; with a judge, all comparisons
    too_different: int | None  # pairs dropped because the lengths of their sides differ too much; None: not asked

    @cached_property
    def pairs(self) -> OnlinePairs:
        """[N]; their tokens are copied when it is read first."""
        return self.rows.whole()

    @property
    def dropped(self) -> int:
        """Prompts without a pair, whatever the reason."""
        return self.num_prompts - len(set(self.rows.prompt_index.tolist()))

    @property
    def num_prompts(self) -> int:
        return len(self.rows.rollouts.prompts)


def _same_prompts(one: Sequences, other: Sequences) -> bool:
    return torch.equal(one.prompt_lengths, other.prompt_lengths) and torch.equal(
        _prompt_tokens(one), _prompt_tokens(other)
    )


def _prompt_tokens(sequences: Sequences) -> Tensor:
    """[sum of prompt_lengths] int32."""
    lengths = sequences.lengths.numpy()
    begins = lengths.cumsum() - lengths
    return join_slices(sequences.tokens, begins, begins + sequences.prompt_lengths.numpy())
