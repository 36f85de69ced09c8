"""What the CUDA platform computes with, on a CPU: a strict twin of torch's ``varlen_attn``, and a platform with it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.base import LogitChunks
from rlxf.platform.cpu import CpuPlatform
from rlxf.platform.cuda import CudaPlatform


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` as its documentation states it; refuses what the kernel refuses."""
    assert query.dtype in (torch.bfloat16, torch.float16), "FlashAttention only supports fp16 and bf16"
    assert query.dtype == key.dtype == value.dtype
    assert query.size(-1) == key.size(-1) == value.size(-1) <= 256
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.size(1) == key.size(1), "as many heads unless enable_gqa"
    assert query.size(1) % key.size(1) == 0
    assert type(max_q) is type(max_k) is int
    bounds = [pairwise(cu.numpy().tolist()) for cu in (cu_seq_q, cu_seq_k)]
    outputs, ends = [], (0, 0)
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        k, v = (x[k0:k1].repeat_interleave(query.size(1) // key.size(1), dim=1).float() for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1].float(), k) * (scale or query.size(-1) ** -0.5)
        behind, ahead = window_size
        distance = torch.arange(k1 - k0) - (torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0))
        hidden = (distance > ahead) & (ahead >= 0) | (distance < -behind) & (behind >= 0)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        ends = (q1, k1)
    assert ends == (len(query), len(key)), "the last bound is the number of rows"
    return torch.cat(outputs).to(query.dtype)


class CudaOnCpu(CpuPlatform):
    """A CPU that attends and cuts the head's logits as the CUDA platform does."""

    logit_chunks = LogitChunks(elements=2**12, rows=8, columns=64)

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        return CudaPlatform().packed_attention(query, key, value, blocks, scale)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """``varlen_attn`` above in place of torch's."""
    from rlxf.platform import cuda

    cuda.varlen_attention.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    yield
    cuda.varlen_attention.cache_clear()
