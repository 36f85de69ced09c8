"""Cutting Hugging Face tensors into tensor-parallel shares and joining them again, without any process group."""

from __future__ import annotations

import pytest
import torch

from rlxf.models.megatron.weights import Geometry, Kind, to_full, to_local

GEOMETRY = Geometry(heads=8, kv_heads=4, head_size=4, vocab_size=23, padded_vocab_size=24)
SHAPES: dict[Kind, list[tuple[int, ...]]] = {
    "replicated": [(16,)],
    "vocab": [(23, 16)],
    "row": [(16, 24)],
    "gate_up": [(24, 16), (24, 16)],
    "qkv": [(32, 16), (16, 16), (16, 16)],
}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_joining_the_shares_gives_the_tensors_back(kind: Kind, tp_size: int) -> None:
    tensors = [torch.randn(shape) for shape in SHAPES[kind]]
    shards = [to_local(kind, tensors, GEOMETRY, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    joined = to_full(kind, shards, GEOMETRY)
    assert all(torch.equal(a, b) for a, b in zip(joined, tensors, strict=True))
    assert len({shard.shape for shard in shards}) == 1  # the ranks hold equal shares, of a padded vocabulary too


def test_qkv_shares_hold_whole_groups() -> None:
    """Rank 0 of 2 holds the query heads 0-3 with their key/value heads 0-1, packed group by group."""
    query, key, value = (torch.arange(rows * 16).view(rows, 16) for rows in (32, 16, 16))
    first = to_local("qkv", [query, key, value], GEOMETRY, tp_rank=0, tp_size=2)
    assert torch.equal(first[:8], query[:8])
    assert torch.equal(first[8:12], key[:4])
    assert torch.equal(first[12:16], value[:4])
    assert torch.equal(first[16:24], query[8:16])
