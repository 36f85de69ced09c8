"""The 4-bit base: what it computes, what it holds, and what comes out when adapters are merged into it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.core.errors import ConfigError
from rlxf.core.types import Sequences
from rlxf.models.megatron.nf4 import Nf4Linear, base_weight
from tests.lora_model import TARGETS, adapted_model, gradients, logps, merged_tensors, randomize_adapters
from tests.settings import random_pairs
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return random_pairs(5, seed=3).chosen


def nf4_linears(model: Any) -> list[Any]:
    return [module for module in model.last.modules() if isinstance(module, Nf4Linear)]


def adapted_linears(model: Any) -> list[Any]:
    return [module for module in model.last.modules() if hasattr(module, "adapter")]


def test_a_4_bit_base_computes_with_its_dequantized_weights(folder: Path, sequences: Sequences) -> None:
    """Forward and gradients equal those of a model that holds the same rounded weights in fp32."""
    model, plain = adapted_model(folder, qlora=True), adapted_model(folder)
    for quantized, linear in zip(nf4_linears(model), adapted_linears(plain), strict=True):
        linear.weight.data.copy_(quantized.dequantized())
    for one in (model, plain):
        randomize_adapters(one)
    torch.testing.assert_close(logps(model, sequences), logps(plain, sequences), atol=1e-6, rtol=0)
    expected = gradients(plain, sequences)
    found = gradients(model, sequences)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_a_4_bit_weight_takes_half_a_byte(folder: Path) -> None:
    model = adapted_model(folder, qlora=True)
    linears = nf4_linears(model)
    assert len(linears) == 2 * len(TARGETS)
    for linear in linears:
        assert linear.packed.nbytes == linear.weight.numel() // 2
        assert linear.weight.is_meta
        assert not any(p.numel() == linear.weight.numel() and not p.is_meta for p in linear.parameters())


def test_a_4_bit_weight_is_near_the_weight(folder: Path) -> None:
    model, plain = adapted_model(folder, qlora=True), adapted_model(folder)
    for quantized, linear in zip(nf4_linears(model), adapted_linears(plain), strict=True):
        error = (quantized.dequantized() - linear.weight).abs()
        # The widest gap between NF4's values is 0.304 of a block's largest one; rounding is off by half of it.
        largest = linear.weight.detach().abs().reshape(-1, 64).amax(dim=1, keepdim=True)
        assert bool((error.reshape(-1, 64) <= 0.1525 * largest).all())
        assert quantized.weight.shape == linear.weight.shape


def test_merging_writes_a_4_bit_base_out(folder: Path) -> None:
    model = adapted_model(folder, qlora=True)
    randomize_adapters(model)
    linear = model.last.decoder.layers[1].self_attention.linear_proj
    merged = merged_tensors(model)["model.layers.1.self_attn.o_proj.weight"]
    expected = base_weight(linear) + 2.0 * linear.adapter.lora_B @ linear.adapter.lora_A
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)


def test_qwen_biases_survive_quantization(tmp_path: Path, sequences: Sequences) -> None:
    folder = save_causal_lm(tmp_path / "qwen", "qwen2")
    model, plain = adapted_model(folder, qlora=True), adapted_model(folder)
    for quantized, linear in zip(nf4_linears(model), adapted_linears(plain), strict=True):
        linear.weight.data.copy_(quantized.dequantized())
    torch.testing.assert_close(logps(model, sequences), logps(plain, sequences), atol=1e-6, rtol=0)


def test_a_missing_bitsandbytes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"actor_rollout\.qlora = true: needs bitsandbytes.*rlxf\[qlora\]"):
        adapted_model(folder, qlora=True)
