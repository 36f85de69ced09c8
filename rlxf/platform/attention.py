"""Packed attention: the sizes of its blocks, and the way that works on every device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.core.tensors import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBlocks:
    """Consecutive rows of queries, each block with its own consecutive rows of keys and values.

    Aligned at the end: a block's last query sees all of its keys, the one before all but the last, and so on. The sizes
    are known on the host as well: no layer has to wait for the device to read them.
    """

    queries: tuple[int, ...]  # rows of each block
    keys: tuple[int, ...]  # the same of keys and values; at least as many as queries
    cu_seqlens_q: Tensor  # [blocks + 1] int32 on the device: where each block begins, and the end of the last one
    cu_seqlens_kv: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Self:
        bounds = torch.tensor([[0, *accumulate(sizes)] for sizes in (queries, keys)], dtype=torch.int32)
        bounds = to_device(bounds, device)
        return cls(queries=tuple(queries), keys=tuple(keys), cu_seqlens_q=bounds[0], cu_seqlens_kv=bounds[1])


def attention_by_block(query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float) -> Tensor:
    """``Platform.packed_attention`` as a loop over the blocks, for dtypes and devices without a packed kernel."""
    queries, keys = list(blocks.queries), list(blocks.keys)
    pieces = torch.split(query, queries), torch.split(key, keys), torch.split(value, keys)
    outputs = []
    for q, k, v in zip(*pieces, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        square = q.size(2) == k.size(2)
        mask = None if square else _aligned_at_end(q.size(2), k.size(2), q.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, scale=scale, enable_gqa=True)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


@functools.lru_cache(maxsize=32)
def _aligned_at_end(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys each query sees."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=keys - queries)
