"""Adapters on one rank: what they add, what stays frozen, merging, dropout, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.core.types import Sequences
from rlxf.models.megatron.lora import adapters, adapters_off, seed_dropout
from rlxf.models.megatron.weights import load_entries
from tests.lora_model import TARGETS, adapted_model, gradients, loaded, logps, merged_tensors, randomize_adapters
from tests.settings import random_pairs
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return random_pairs(5, seed=3).chosen


def test_fresh_adapters_change_nothing(folder: Path, sequences: Sequences) -> None:
    assert torch.equal(logps(adapted_model(folder), sequences), logps(loaded(folder), sequences))


def test_switched_off_adapters_leave_the_base_bit_for_bit(folder: Path, sequences: Sequences) -> None:
    model = adapted_model(folder)
    randomize_adapters(model)
    base = logps(loaded(folder), sequences)
    assert float((logps(model, sequences) - base).abs().max()) > 0.1
    with adapters_off(model.chunks):
        assert torch.equal(logps(model, sequences), base)
    assert float((logps(model, sequences) - base).abs().max()) > 0.1


@pytest.mark.parametrize("targets", [("linear_qkv",), ("linear_fc2", "linear_proj"), TARGETS])
def test_only_the_target_linears_adapters_train(folder: Path, sequences: Sequences, targets: tuple[str, ...]) -> None:
    model = adapted_model(folder, lora_target_modules=targets)
    randomize_adapters(model)
    trained = gradients(model, sequences)
    assert set(trained) == {name for name, p in model.last.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == set(targets)
    assert len(trained) == 2 * 2 * len(targets)  # layers, A and B
    assert all(bool(gradient.any()) for gradient in trained.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_merged_weights_compute_what_the_adapters_compute(tmp_path: Path, kind: str) -> None:
    sequences = random_pairs(5, seed=3).chosen
    folder = save_causal_lm(tmp_path / "model", kind)
    model = adapted_model(folder)
    randomize_adapters(model)
    plain = loaded(folder)
    parameters = dict(plain.last.named_parameters())
    load_entries(
        plain.entries_of(0), parameters, merged_tensors(model).__getitem__, plain.geometry, tp_rank=0, tp_size=1
    )
    torch.testing.assert_close(logps(plain, sequences), logps(model, sequences), atol=2e-5, rtol=0)


def test_a_merged_bf16_weight_is_rounded_once(folder: Path) -> None:
    model = adapted_model(folder, bf16=True)
    randomize_adapters(model)
    linear = model.last.decoder.layers[0].mlp.linear_fc2
    adapter = linear.adapter
    exact = linear.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()  # alpha / r = 2
    merged = merged_tensors(model)["model.layers.0.mlp.down_proj.weight"]
    assert merged.dtype == torch.bfloat16
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((merged.double() - exact).abs() <= exact.abs() * half_a_unit * 1.001 + 1e-9).all())


def test_the_start_depends_on_seed_and_place_alone(folder: Path) -> None:
    def first(model: Any) -> list[Tensor]:
        return [adapter.lora_A.detach().clone() for adapter in adapters(model.chunks)]

    start, same = first(adapted_model(folder)), first(adapted_model(folder))
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(start, same, strict=True))
    other = first(adapted_model(folder, seed=2))
    assert not any(torch.equal(a, b) for a, b in zip(start, other, strict=True))
    assert not torch.equal(start[0], start[4])  # the same linear of two layers
    only = first(adapted_model(folder, lora_target_modules=("linear_fc2",)))
    assert torch.equal(only[0], start[3])
    bound = 1 / 128**0.5  # PEFT's: uniform in 1 / sqrt(in)
    assert bound * 0.95 < float(start[0].abs().max()) <= bound


def test_dropout_is_drawn_from_the_key_of_the_step(folder: Path, sequences: Sequences) -> None:
    model = adapted_model(folder, lora_dropout=0.5)
    randomize_adapters(model)

    def drawn(step: int) -> dict[str, Tensor]:
        seed_dropout(1, step)
        return gradients(model, sequences)

    first = drawn(3)
    torch.rand(7)  # what others draw does not matter
    assert all(torch.equal(first[name], value) for name, value in drawn(3).items())
    assert not any(torch.equal(first[name], value) for name, value in drawn(4).items())
    before = torch.get_rng_state()
    gradients(model, sequences)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_zeroes_its_share_of_the_inputs_and_scales_the_rest(folder: Path) -> None:
    model = adapted_model(folder, lora_dropout=0.25)
    adapter = next(adapters(model.chunks))
    with torch.no_grad():
        adapter.lora_A.zero_()
        adapter.lora_A[:4, :4] = torch.eye(4)
        adapter.lora_B.zero_()
        adapter.lora_B[:4] = torch.eye(4)
    passed = adapter(torch.ones(5000, 1, 128))[..., :4] / adapter.scale
    assert passed.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((passed == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_no_dropout_without_gradients(folder: Path, sequences: Sequences) -> None:
    model = adapted_model(folder, lora_dropout=0.5)
    randomize_adapters(model)
    plain = adapted_model(folder)
    randomize_adapters(plain)
    assert torch.equal(logps(model, sequences), logps(plain, sequences))
    assert all(adapter.training for adapter in adapters(model.chunks))


def test_recomputed_layers_give_the_same_gradients(folder: Path, sequences: Sequences) -> None:
    """Also with dropout: the second forward pass draws what the first one drew."""
    model = adapted_model(folder, lora_dropout=0.3)
    randomize_adapters(model)
    config = model.last.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    seed_dropout(1, 0)
    recomputed = gradients(model, sequences)
    seed_dropout(1, 0)
    config.recompute_granularity = None
    kept = gradients(model, sequences)
    assert set(kept) == set(recomputed)
    for name, value in kept.items():
        assert torch.equal(recomputed[name], value), name
