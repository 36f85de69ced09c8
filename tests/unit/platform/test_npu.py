"""The fused operations of the NPU platform, through twins written from torch-npu's documentation."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.platform.elementwise import Elementwise
from rlxf.platform.npu import NpuElementwise


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert self.dtype == gamma.dtype
    assert 2 <= self.dim() <= 8
    assert gamma.shape == self.shape[-1:]
    reverse = (self.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (self.float() * reverse * gamma.float()).to(self.dtype), reverse


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    size, batch, heads, width = input.shape  # SBND
    assert r1.shape == r2.shape == (size, 1, 1, width)
    assert width < 896
    assert width % 2 == 0
    assert batch < 1000
    assert heads < 1000
    assert r1.abs().max() <= 1
    assert r2.abs().max() <= 1
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), dim=-1)


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    gate, up = self.chunk(2, dim)
    return F.silu(gate) * up


@pytest.fixture(autouse=True)
def _twin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_npu")
    for operation in (npu_rms_norm, npu_rotary_mul, npu_swiglu):
        setattr(module, operation.__name__, operation)
    monkeypatch.setitem(sys.modules, "torch_npu", module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_are_the_plain_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, heads = torch.randn(5, 1, 8), torch.randn(8), torch.randn(5, 3, 8)
    angles = torch.randn(5, 1, 8)
    plain, fused = Elementwise(), NpuElementwise()
    x, weight, heads, cos, sin = (value.to(dtype) for value in (x, weight, heads, angles.cos(), angles.sin()))
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), **tolerance)
    torch.testing.assert_close(fused.rotate(heads, cos, sin), plain.rotate(heads, cos, sin), **tolerance)
    torch.testing.assert_close(fused.swiglu(x), plain.swiglu(x), **tolerance)
