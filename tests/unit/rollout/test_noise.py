"""Noise by seed and position: the right distribution, reproducible, and the same in any batch."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.config.schema import RolloutConfig
from rlxf.platform import PLATFORMS
from rlxf.rollout import noise, vllm
from rlxf.rollout.engine import EngineSettings
from rlxf.rollout.noise import exponential, install
from rlxf.rollout.vllm_worker import WeightLoader
from tests.tiny_models import save_causal_lm

CPU = torch.device("cpu")
SEEDS = [2**63 - 1, 0, 1, 12345678901234567]


@dataclass
class Generator:
    """torch's generator of a device; that of a CPU has no offset."""

    seed: int
    offset: int = 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def distance(values: Tensor) -> float:
    """Kolmogorov-Smirnov distance to the exponential distribution, times the root of the number of values."""
    ordered = -torch.expm1(-values.flatten().double().sort().values)
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    largest = torch.maximum((ordered - steps[:-1]).abs(), (ordered - steps[1:]).abs()).max()
    return float(largest) * math.sqrt(count)


def rows(seeds: range, positions: range, width: int) -> Tensor:
    """[seeds, positions, width]."""
    pairs = [(seed, position) for seed in seeds for position in positions]
    out = exponential([seed for seed, _ in pairs], [position for _, position in pairs], width, CPU)
    return out.view(len(seeds), len(positions), width)


# 1.95 is exceeded with probability 1e-3 by values that are exponential (Kolmogorov 1933); the table is fixed.
LIMIT = 1.95


def test_noise_is_exponential_over_columns_and_over_positions_and_over_seeds() -> None:
    found = rows(range(40), range(50), 500)
    assert distance(found) < LIMIT
    assert max(distance(found[seed, 0]) for seed in range(40)) < 2.5  # the largest of 40
    assert max(distance(found[0, :, column]) for column in range(0, 500, 10)) < 2.5
    assert max(distance(found[:, 7, column]) for column in range(0, 500, 10)) < 2.5
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())


def test_neighbouring_seeds_positions_and_columns_are_uncorrelated() -> None:
    found = torch.expm1(-rows(range(40), range(50), 500)) + 0.5  # uniform, mean 0
    for dim in range(3):
        size = found.size(dim) - 1
        product = (found.narrow(dim, 0, size) * found.narrow(dim, 1, size)).flatten()
        # A product has standard deviation 1/12; five of the mean's.
        assert abs(float(product.mean())) < 5 / 12 / math.sqrt(len(product)), dim


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Chi-square with 9 degrees of freedom: above 27.9 with probability 1e-3."""
    count = 20_000
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    drawn = (probs / exponential(list(range(count)), [3] * count, 10, CPU)).argmax(-1)
    observed = torch.bincount(drawn, minlength=10).double()
    expected = probs.double() * count
    assert float(((observed - expected).square() / expected).sum()) < 27.9


def test_a_row_is_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exponential(SEEDS, [0, 5, 5, 9], 1000, CPU)
    for row, (seed, position) in enumerate(zip(SEEDS, [0, 5, 5, 9], strict=True)):
        assert torch.equal(exponential([seed], [position], 1000, CPU)[0], whole[row])
    monkeypatch.setattr(noise, "_ELEMENTS", 2000)  # two rows at a time
    assert torch.equal(exponential(SEEDS[::-1], [9, 5, 5, 0], 1000, CPU), whole.flip(0))


def test_seed_and_position_make_a_row() -> None:
    made = {tuple(row.tolist()) for row in rows(range(30), range(30), 6).view(-1, 6)}
    assert len(made) == 900
    first, again = (exponential([7], [3], 6, CPU) for _ in range(2))
    assert torch.equal(first, again)


def plugin() -> tuple[ModuleType, list[int]]:
    """A module with a sampler that calls ``random_sample`` by its name, as the plugin's does."""
    module, calls = ModuleType("sampler"), list[int]()

    def random_sample(probs: Tensor, generators: dict[int, Any]) -> Tensor:
        calls.append(len(generators))
        return probs.argmax(-1)

    vars(module)["random_sample"] = random_sample
    exec("def forward(probs, generators): return random_sample(probs, generators)", vars(module))
    return module, calls


def test_the_sampler_draws_by_seed_and_number_of_the_token() -> None:
    module, calls = plugin()
    install(module)
    probs = torch.rand(3, 50).softmax(-1)
    generators = {row: Generator(seed) for row, seed in enumerate((11, 22, 33))}
    drawn = [module.forward(probs.clone(), generators) for _ in range(5)]
    for position, tokens in enumerate(drawn):
        wanted = probs / exponential([11, 22, 33], [position] * 3, 50, CPU)
        assert torch.equal(tokens, wanted.argmax(-1))
    assert not calls
    assert len({tuple(tokens.tolist()) for tokens in drawn}) > 1
    assert [generator.offset for generator in generators.values()] == [20, 20, 20]
    # A token that did not count is taken back by 4, and drawn again.
    generators[1].set_offset(generators[1].get_offset() - 4)
    other = {0: Generator(33, 20), 1: generators[1]}  # in another batch, at another row
    tokens = module.forward(probs[[2, 1]].clone(), other)
    assert tokens[1] == drawn[4][1]


def test_an_engine_on_a_device_whose_plugin_draws_row_by_row_gets_this_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the worker is called as vLLM's executors do: by the name of the method."""
    module, _ = plugin()
    monkeypatch.setitem(sys.modules, "vllm_ascend.sample.sampler", module)
    calls = list[str]()

    def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> None:
        calls.append(method)
        getattr(WeightLoader(), method)(*args)

    cache = SimpleNamespace(cache_config=SimpleNamespace(block_size=128))
    llm = SimpleNamespace(collective_rpc=collective_rpc, llm_engine=SimpleNamespace(vllm_config=cache))
    monkeypatch.setattr(vllm, "_start", lambda *_, **__: llm)
    monkeypatch.setattr(vllm, "prepare_environment", lambda _: None)
    folder = str(save_causal_lm(tmp_path))
    settings = EngineSettings(model=folder, tokenizer=folder, dtype="float32", max_length=8, rollout=RolloutConfig())
    vllm.VllmEngine(settings, PLATFORMS["cpu"]())
    assert not calls
    vllm.VllmEngine(settings, PLATFORMS["npu"]())
    assert calls == ["rlxf_draw_all_rows_at_once"]
    probs = torch.rand(1, 50)
    wanted = (probs / exponential([9], [0], 50, CPU)).argmax(-1)
    assert torch.equal(module.forward(probs.clone(), {0: Generator(9)}), wanted)


def test_rows_without_a_seed_are_drawn_by_the_device() -> None:
    module, calls = plugin()
    install(module)
    installed = module.random_sample
    install(module)
    assert module.random_sample is installed
    probs = torch.rand(4, 50).softmax(-1)
    torch.manual_seed(0)
    tokens = module.forward(probs.clone(), {3: Generator(5), 1: Generator(6)})
    wanted = (probs[[3, 1]] / exponential([5, 6], [0, 0], 50, CPU)).argmax(-1)
    assert torch.equal(tokens[[3, 1]], wanted)
    assert not calls
    module.forward(probs, {})
    assert calls == [0]
