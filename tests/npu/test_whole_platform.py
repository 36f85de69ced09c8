"""The NPU platform trains on a CPU through the twin of torch_npu, with the numbers of the CPU platform."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.config.schema import RolloutConfig
from rlxf.core.types import Metrics
from rlxf.platform import Platform, Process, get_platform
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import EngineSettings, Sampling
from tests.npu_world import NpuOnCpu, install_twin, torch_npu
from tests.ranks import on_ranks
from tests.rollout_world import prompt_batch, random_prompts
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm

__all__ = ["torch_npu"]

# In fp32, where twin and CPU platform differ in the order of sums. Measured: 5e-7 of a metric, 2e-6 nats and 1e-7 of a
# weight.
METRICS, LOGPS, WEIGHTS = 3e-6, 1e-5, 1e-6
# Adam divides a gradient by its size. With a larger eps a gradient that is all rounding moves no weight by a step.
ADAM_EPS = 1e-4
STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    metrics: list[Metrics]
    logps: Tensor
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("model"), tied=True)


def train(folder: Path, platform: Platform, process: Process, **settings: Any) -> Trained:
    config = run_config(folder, ppo_mini_batch_size=7, adam_eps=ADAM_EPS, **settings)
    actor = build_actor(config, platform, process)
    metrics = [actor.update(referenced(random_pairs(7, seed=step)), step) for step in range(STEPS)]
    logps = actor.token_logps(random_pairs(7).chosen)
    weights = {name: value.detach().clone() for name, value in actor.model.chunks[0].named_parameters()}
    return Trained(metrics=metrics, logps=logps, weights=weights)


def assert_equal(found: Trained, wanted: Trained) -> None:
    for mine, theirs in zip(found.metrics, wanted.metrics, strict=True):
        assert mine == {name: pytest.approx(value, rel=METRICS, abs=1e-5) for name, value in theirs.items()}
    torch.testing.assert_close(found.logps, wanted.logps, atol=LOGPS, rtol=0)
    assert found.weights.keys() == wanted.weights.keys()
    for name, value in found.weights.items():
        torch.testing.assert_close(value, wanted.weights[name], atol=WEIGHTS, rtol=0)


def train_through_twin(folder: Path, process: Process, **settings: Any) -> tuple[Trained, set[str]]:
    """The result, and the calls of torch_npu that made it."""
    with pytest.MonkeyPatch.context() as patch:
        twin = install_twin(patch)
        return train(folder, NpuOnCpu(), process, **settings), set(twin.CALLS)


def test_three_steps_are_those_of_the_cpu_platform(folder: Path) -> None:
    """Shared prompts among them, so that queries and keys of a block differ in number."""
    found, calls = train_through_twin(folder, Process())
    assert_equal(found, train(folder, get_platform("cpu"), Process()))
    assert calls == {
        "contrib.transfer_to_npu",
        "npu.set_device",
        "npu_fusion_attention",
        "npu_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
        "_fused_adamw_",
    }


def _rank(rank: int, world_size: int, port: int, folder: Path, out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    settings = {"tensor_model_parallel_size": world_size, "sequence_parallel": True}
    found, calls = train_through_twin(folder, process, **settings)
    assert "npu_fusion_attention" in calls
    assert_equal(found, train(folder, get_platform("cpu"), process, **settings))
    torch.save(found.metrics, out / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_tensor_parallel_ranks_train_as_one(folder: Path, tmp_path: Path) -> None:
    on_ranks(_rank, 2, folder, tmp_path)
    whole = train(folder, get_platform("cpu"), Process())
    for rank in range(2):
        for mine, theirs in zip(torch.load(tmp_path / f"rank_{rank}.pt"), whole.metrics, strict=True):
            assert mine == {name: pytest.approx(value, rel=METRICS, abs=1e-5) for name, value in theirs.items()}


def test_the_plain_engine_samples_the_tokens_of_the_cpu_platform(folder: Path, torch_npu: Any) -> None:
    sampling = Sampling(num_samples=3, max_new_tokens=8, seed=5)
    settings = EngineSettings(
        model=str(folder), tokenizer=str(folder), dtype="float32", max_length=200, rollout=RolloutConfig(engine="hf")
    )
    found, wanted = (
        HfEngine(settings, platform).generate(prompt_batch(random_prompts((1, 4, 150))), sampling)
        for platform in (NpuOnCpu(), get_platform("cpu"))
    )
    assert torch.equal(found.sequences.tokens, wanted.sequences.tokens)
    torch.testing.assert_close(found.engine_logps, wanted.engine_logps, atol=LOGPS, rtol=0)
    assert torch_npu.CALLS["npu_fusion_attention"] == 2  # a prompt pass of two layers


@pytest.mark.usefixtures("torch_npu")
def test_the_memory_of_the_device_is_read() -> None:
    platform = NpuOnCpu()
    assert platform.is_available()
    platform.set_device(0)
    platform.synchronize()
    platform.empty_cache()
    platform.reset_peak_memory()
    assert (platform.max_memory_allocated(), platform.free_memory(), platform.total_memory()) == (0, 2**36, 2**36)
