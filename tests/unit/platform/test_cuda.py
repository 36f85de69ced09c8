"""The CUDA platform's calls, on a CPU: attention through a strict twin of torch's kernel, and compiled functions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from rlxf.platform import compiled, cuda, get_platform
from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.elementwise import Elementwise
from tests.cuda_world import twin, varlen_attn

QUERIES, KEYS = [5, 1, 3, 9], [5, 6, 7, 9]  # the second and third see keys before their own

__all__ = ["twin"]


def attend(platform: Any, dtype: torch.dtype, kv_heads: int = 2) -> list[Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(QUERIES), 4), (sum(KEYS), kv_heads), (sum(KEYS), kv_heads)]
    leaves = [torch.randn(*shape, 8, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    out = platform.packed_attention(*leaves, AttentionBlocks.of(QUERIES, KEYS, torch.device("cpu")), 0.3)
    out.float().square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_the_name_of_a_device_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read without CUDA, which would take memory on a device in a process that computes nothing there."""
    monkeypatch.setattr(cuda, "_GPUS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "asked")
    assert cuda.CudaPlatform().device_name() == "asked"
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 12\n")
    assert cuda.CudaPlatform().device_name() == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("twin")
def test_attention_is_that_of_a_cpu(kv_heads: int) -> None:
    for found, wanted in zip(
        attend(cuda.CudaPlatform(), torch.bfloat16, kv_heads),
        attend(get_platform("cpu"), torch.bfloat16, kv_heads),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_fp32_does_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are for half precision; recipes for a first try are in fp32."""
    monkeypatch.setattr(cuda, "varlen_attention", lambda: pytest.fail("called"))
    for found, wanted in zip(
        attend(cuda.CudaPlatform(), torch.float32), attend(get_platform("cpu"), torch.float32), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("twin")
def test_grouped_heads_are_asked_for_where_torch_wants_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.varlen_attention().keywords == {"enable_gqa": True}  # type: ignore[attr-defined]

    def before(query: Tensor, key: Tensor, *, scale: float, window_size: tuple[int, int]) -> Tensor:
        return query

    cuda.varlen_attention.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", before)
    assert cuda.varlen_attention() is before


def test_torch_has_the_arguments_that_the_twin_has() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn as real

    known = inspect.signature(real).parameters
    assert list(inspect.signature(varlen_attn).parameters)[:7] == list(known)[:7]
    assert set(inspect.signature(varlen_attn).parameters) <= set(known)


def test_the_head_as_one_expression_is_the_head_step_by_step() -> None:
    """What is compiled against the plain operations, in fp32 and before any compiler."""
    torch.manual_seed(0)
    logits, columns = torch.randn(6, 10), torch.tensor([-3, 0, 9, 10, 4, 25])
    top, total, picked = torch.randn(6), torch.rand(6), torch.randn(6)
    plain = Elementwise().add_logits(logits.clone(), columns, top, total, picked)
    for found, wanted in zip(compiled._add_logits(logits, columns, top, total, picked), plain, strict=True):
        torch.testing.assert_close(found, wanted)
    normalizer, grad = logits.logsumexp(dim=1), torch.rand(6)
    slope = Elementwise().slope(logits.clone(), columns, normalizer, grad)
    torch.testing.assert_close(compiled._slope(logits, columns, normalizer, grad), slope)
    assert float(slope[0].sum()) < 0 < float(slope[1, 0])  # a target of another part; one of this part


def test_without_a_compiler_the_function_itself_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def failing(function: Any) -> Any:
        def call(*_: Tensor) -> Tensor:
            calls.append(function)
            raise TorchDynamoException("no C compiler found")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    doubled = compiled.Compiled(lambda x: 2 * x)
    with caplog.at_level(logging.WARNING):
        assert doubled(torch.ones(2)).tolist() == doubled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == len(caplog.records) == 1
    assert "no C compiler found" in caplog.text


def test_a_worker_compiles_without_processes_of_its_own() -> None:
    assert cuda.CudaPlatform().worker_environment(1)["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
