"""Token rows packed end to end for one forward pass: what attends to what, and which rows predict what.

A prompt that several sequences of a micro-batch share stands in the stream once, followed by their completions; a
completion attends to its prompt and to itself, and its positions go on where the prompt ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.tensors import to_device
from rlxf.core.types import Sequences
from rlxf.models.batching import prompt_groups
from rlxf.models.megatron.parallel import Layout
from rlxf.platform.attention import AttentionBlocks

Indices = np.ndarray[tuple[int, ...], np.dtype[Any]]  # int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Attention of a packed stream: consecutive query rows, each block with its own rows of keys and values."""

    sizes: AttentionBlocks
    kv_rows: Tensor | None  # [sum of sizes.keys] int64 rows of the stream's keys; None: each block sees its own rows


@dataclass
class PackedStream(PackedSeqParams):  # type: ignore[misc]
    """What megatron hands to core attention: the blocks, and the rotation of each token."""

    blocks: Blocks | None = None
    rotation: tuple[Tensor, Tensor] | None = None  # cosine and sine, [T / cp, 1, head_size] each


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Sequences laid end to end for one forward pass, as far as this context-parallel rank computes them."""

    tokens: Tensor  # [1, T / cp] int64
    positions: Tensor  # [T / cp] int64, restarting with each sequence
    num_tokens: int  # T, of the whole stream
    blocks: Blocks
    rows: Tensor  # [R] int64 own rows whose hidden state is read: predictors of completion tokens, or last tokens
    targets: Tensor  # [R] int64: the token that each of ``rows`` predicts
    places: Tensor | None  # [R] int64 position of each of ``rows`` among the values of all ranks; None: all are here
    lengths: Tensor  # [B] int64: how many of the values of all ranks belong to each sequence

    @property
    def num_values(self) -> int:
        """Rows that are read on all context-parallel ranks together."""
        return int(self.lengths.sum())

    def parameters(self, rotation: tuple[Tensor, Tensor]) -> PackedStream:
        """What every layer gets; ``rotation``: cosine and sine of the tokens' angles."""
        return PackedStream(qkv_format="thd", blocks=self.blocks, rotation=rotation)


def pack_for_logps(
    sequences: Sequences, layout: Layout, *, share_prompts: bool = True, num_tokens: int | None = None
) -> Packed:
    """Everything but each sequence's last token, which predicts nothing; ``rows`` are the completions' predictors.

    Args:
        sequences: at least one, each with a prompt token and a completion token.
        layout: whose share of the stream is wanted, and the device.
        share_prompts: compute equal prompts once.
        num_tokens: fill the stream up to this length; None: up to what the layout's ranks share evenly.
    """
    if not len(sequences) or int(sequences.completion_lengths.min()) < 1 or int(sequences.prompt_lengths.min()) < 1:
        raise ShapeError(
            "log-probabilities need at least one sequence, each with a prompt token and a completion token"
        )
    stream = _Stream(sequences, share_prompts=share_prompts, without_last=1)
    rows = [np.append(stream.prompt_rows[i][-1:], stream.completion_rows[i]) for i in range(len(sequences))]
    starts = (sequences.lengths.cumsum(0) - sequences.completion_lengths).numpy()
    targets = [np.arange(s, s + len(r)) for s, r in zip(starts, rows, strict=True)]
    return stream.finish(rows, np.concatenate(targets), layout, num_tokens)


def pack_for_scores(
    sequences: Sequences, layout: Layout, *, share_prompts: bool = True, num_tokens: int | None = None
) -> Packed:
    """Whole sequences; ``rows`` are the last tokens, where a reward model reads its score. Arguments as above."""
    if not len(sequences) or int(sequences.lengths.min()) < 1:
        raise ShapeError("scores need at least one sequence, each with at least one token")
    stream = _Stream(sequences, share_prompts=share_prompts, without_last=0)
    rows = [np.append(stream.prompt_rows[i], stream.completion_rows[i])[-1:] for i in range(len(sequences))]
    return stream.finish(rows, (sequences.lengths.cumsum(0) - 1).numpy(), layout, num_tokens)


class _Stream:
    """The order of tokens: for each prompt its tokens, then the completions of all sequences that share it."""

    def __init__(self, sequences: Sequences, *, share_prompts: bool, without_last: int) -> None:
        self._tokens = sequences.tokens.numpy()
        self.prompt_rows: dict[int, Indices] = {}  # sequence -> rows of its prompt in the stream
        self.completion_rows: dict[int, Indices] = {}
        self._sources: list[Indices] = []  # pieces of the stream, as indices into the flat tokens
        self._positions: list[Indices] = []
        self._blocks: list[tuple[int, Indices]] = []  # number of queries, rows of keys
        self._length = 0
        lengths, prompts = sequences.lengths.tolist(), sequences.prompt_lengths.tolist()
        starts = (sequences.lengths.cumsum(0) - sequences.lengths).tolist()
        for group in _groups(sequences, share_prompts):
            prompt = self._append(starts[group[0]], prompts[group[0]], 0)
            if len(group) > 1:
                self._blocks.append((len(prompt), prompt))
            for i in group:
                length = max(lengths[i] - without_last - prompts[i], 0)
                completion = self._append(starts[i] + prompts[i], length, prompts[i])
                self.prompt_rows[i], self.completion_rows[i] = prompt, completion
                keys = np.concatenate([prompt, completion])
                queries = len(completion) if len(group) > 1 else len(keys)
                if queries:
                    self._blocks.append((queries, keys))
        self.shares = any(queries != len(keys) for queries, keys in self._blocks)

    def _append(self, source: int, length: int, position: int) -> Indices:
        self._sources.append(np.arange(source, source + length))
        self._positions.append(np.arange(position, position + length))
        self._length += length
        return np.arange(self._length - length, self._length)

    def finish(self, rows: Sequence[Indices], targets: Indices, layout: Layout, num_tokens: int | None) -> Packed:
        """``rows``: which rows of the stream are read, per sequence; ``targets``: flat index of what they predict."""
        total = _padded_length(self._length, layout, num_tokens)
        padding = total - self._length
        tokens = np.concatenate([self._tokens[np.concatenate(self._sources)], np.zeros(padding, dtype=np.int64)])
        blocks = [*self._blocks, (padding, np.arange(self._length, total))] if padding else self._blocks
        whole = _Share(
            tokens=tokens,
            positions=np.concatenate([*self._positions, np.arange(padding)]),
            blocks=blocks,
            rows=np.concatenate(rows),
            targets=self._tokens[targets],
            places=None,
        )
        mine = _share_of(whole, layout) if layout.cp_size > 1 else whole
        device = layout.device
        return Packed(
            tokens=_tensor(mine.tokens, device).unsqueeze(0),
            positions=_tensor(mine.positions, device),
            num_tokens=total,
            blocks=_blocks(mine.blocks, device, own_rows=not self.shares and layout.cp_size == 1),
            rows=_tensor(mine.rows, device),
            targets=_tensor(mine.targets, device),
            places=None if mine.places is None else _tensor(mine.places, device),
            lengths=torch.tensor([len(part) for part in rows]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """A stream, or what one context-parallel rank has of it."""

    tokens: Indices
    positions: Indices
    blocks: list[tuple[int, Indices]]
    rows: Indices
    targets: Indices
    places: Indices | None


def _share_of(whole: _Share, layout: Layout) -> _Share:
    """Chunks ``r`` and ``2 cp - 1 - r`` of ``2 cp`` equal ones: causal attention then costs every rank the same.

    Keys and values are gathered over the ranks before attention, so ``blocks`` name rows in the order of the gathered
    tensor: rank after rank, each with its two chunks.
    """
    chunks = np.array_split(np.arange(len(whole.tokens)), 2 * layout.cp_size)
    by_rank = [np.concatenate([chunks[r], chunks[2 * layout.cp_size - 1 - r]]) for r in range(layout.cp_size)]
    gathered = np.empty(len(whole.tokens), dtype=np.int64)
    gathered[np.concatenate(by_rank)] = np.arange(len(whole.tokens))
    mine = by_rank[layout.cp_rank]
    local = np.full(len(whole.tokens), -1, dtype=np.int64)
    local[mine] = np.arange(len(mine))
    places = np.flatnonzero(local[whole.rows] >= 0)
    own = (chunks[layout.cp_rank], chunks[2 * layout.cp_size - 1 - layout.cp_rank])
    return _Share(
        tokens=whole.tokens[mine],
        positions=whole.positions[mine],
        blocks=[(q, gathered[keys]) for chunk in own for q, keys in _cut(whole.blocks, chunk[0], chunk[-1] + 1)],
        rows=local[whole.rows[places]],
        targets=whole.targets[places],
        places=places,
    )


def _cut(blocks: Iterable[tuple[int, Indices]], start: int, stop: int) -> Iterable[tuple[int, Indices]]:
    """The blocks of the stream's rows ``start`` to ``stop``; a block that reaches out of them is cut."""
    first = 0
    for queries, keys in blocks:
        low, high = max(first, start), min(first + queries, stop)
        if low < high:
            yield high - low, keys[: len(keys) - (first + queries - high)]
        first += queries


def _blocks(blocks: Sequence[tuple[int, Indices]], device: torch.device, *, own_rows: bool) -> Blocks:
    sizes = AttentionBlocks.of([q for q, _ in blocks], [len(k) for _, k in blocks], device)
    rows = None if own_rows else _tensor(np.concatenate([k for _, k in blocks]), device)
    return Blocks(sizes=sizes, kv_rows=rows)


def _groups(sequences: Sequences, share_prompts: bool) -> list[list[int]]:
    return prompt_groups(sequences) if share_prompts else [[row] for row in range(len(sequences))]


def _padded_length(length: int, layout: Layout, num_tokens: int | None) -> int:
    if num_tokens is not None and length > num_tokens:
        raise ShapeError(f"{length} tokens do not fit into a stream of {num_tokens}")
    size = layout.stream_multiple
    return -(-(num_tokens or length) // size) * size


def _tensor(values: Indices, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), device)
