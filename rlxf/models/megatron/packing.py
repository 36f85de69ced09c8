"""Token rows packed end to end for one forward pass, and which of them predict what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rlxf.errors import ShapeError
from rlxf.types import Sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Sequences laid end to end for one forward pass; no padding."""

    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [T] int64, restarting with each sequence
    cu_seqlens: Tensor  # [B + 1] int32
    rows: Tensor  # [R] int64: the rows whose hidden state predicts a completion token, or the last row of each sequence
    targets: Tensor  # [R] int64: the token that each of ``rows`` predicts

    def parameters(self) -> PackedSeqParams:
        """Bounds for attention, and one whole range for the rotary embedding, whose angles are gathered already."""
        total = self.tokens.size(1)
        whole = torch.tensor([0, total], dtype=torch.int32, device=self.tokens.device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens_q_padded=whole,
            cu_seqlens_kv_padded=whole,
            max_seqlen_q=total,
            max_seqlen_kv=total,
        )


def pack_for_logps(sequences: Sequences, device: torch.device) -> Packed:
    """Everything but each sequence's last token, which predicts nothing; ``rows`` are the completion's predictors."""
    if not len(sequences) or int(sequences.completion_lengths.min()) < 1 or int(sequences.prompt_lengths.min()) < 1:
        raise ShapeError(
            "log-probabilities need at least one sequence, each with a prompt token and a completion token"
        )
    lengths = sequences.lengths - 1  # [B]
    starts = sequences.lengths.cumsum(0) - sequences.lengths  # [B] in the flat tokens
    inputs = _ranges(starts, lengths)  # [T] flat index of each input token
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # [B + 1]
    first_row = bounds[:-1] + sequences.prompt_lengths - 1
    rows = _ranges(first_row, sequences.completion_lengths)
    flat = sequences.tokens.long()
    targets = flat[_ranges(starts + sequences.prompt_lengths, sequences.completion_lengths)]
    return Packed(
        tokens=flat[inputs].unsqueeze(0).to(device),
        positions=(inputs - starts.repeat_interleave(lengths)).to(device),
        cu_seqlens=bounds.int().to(device),
        rows=rows.to(device),
        targets=targets.to(device),
    )


def pack_for_scores(sequences: Sequences, device: torch.device) -> Packed:
    """Whole sequences; ``rows`` are the last tokens, where a reward model reads its score."""
    if not len(sequences) or int(sequences.lengths.min()) < 1:
        raise ShapeError("scores need at least one sequence, each with at least one token")
    bounds = torch.cat([sequences.lengths.new_zeros(1), sequences.lengths.cumsum(0)])
    starts = bounds[:-1].repeat_interleave(sequences.lengths)
    positions = torch.arange(int(bounds[-1])) - starts
    rows = bounds[1:] - 1
    flat = sequences.tokens.long()
    return Packed(
        tokens=flat.unsqueeze(0).to(device),
        positions=positions.to(device),
        cu_seqlens=bounds.int().to(device),
        rows=rows.to(device),
        targets=flat[rows].to(device),
    )


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``starts[i], starts[i] + 1, ...`` of ``lengths[i]`` entries each, end to end."""
    ends = lengths.cumsum(0)
    offset = starts - (ends - lengths)
    return torch.arange(int(ends[-1])) + offset.repeat_interleave(lengths)
