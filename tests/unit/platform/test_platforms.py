"""Platforms: values that fit each other, attention equal to a plain formula, and a bridge that stays in its place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rlxf.core.errors import ConfigError
from rlxf.platform import PLATFORMS, get_platform
from rlxf.platform.attention import AttentionBlocks


def test_auto_finds_what_this_machine_has() -> None:
    name = get_platform("auto").name
    assert PLATFORMS[name]().is_available()


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of auto, npu, cuda, cpu"):
        get_platform("tpu")


def test_a_device_that_is_not_there_is_refused_with_the_fix() -> None:
    missing = [name for name, kind in PLATFORMS.items() if not kind().is_available()]
    for name in missing:
        with pytest.raises(ConfigError, match=f"training.device = {name}.*training.device=auto"):
            get_platform(name)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_equals_masked_softmax_per_block(kv_heads: int) -> None:
    torch.manual_seed(0)
    queries, keys, heads, size = [5, 1, 3, 9], [5, 6, 7, 9], 4, 8  # the second and third see keys before their own
    blocks = AttentionBlocks.of(queries, keys, torch.device("cpu"))
    query, key, value = (
        torch.randn(sum(lengths), n, size, dtype=torch.float64)
        for lengths, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    out = get_platform("cpu").packed_attention(query, key, value, blocks, 0.3)
    expected = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        expected.append(torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(~mask, -torch.inf), -1), v))
    torch.testing.assert_close(out, torch.cat(expected))


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter: the bridge patches classes of the whole process."""
    command, env = [sys.executable, "-W", "ignore", "-c", code], os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cpu_bridge_shows_its_torch_to_megatron_only() -> None:
    code = """
import torch
from rlxf.platform import get_platform
real = torch.cuda.current_device
get_platform("cpu").prepare_megatron()
import megatron.core.optimizer.optimizer as inside
assert torch.cuda.current_device is real and torch.zeros.__module__ != "rlxf"
assert inside.torch.cuda.current_device() == torch.device("cpu")
assert inside.torch.zeros(1, device="cuda").device.type == "cpu"
assert torch.zeros(1).type() == "torch.FloatTensor"
print("kept")
"""
    assert run(code) == "kept"


@pytest.mark.slow
def test_the_cpu_bridge_hushes_what_a_cuda_build_of_torch_says_without_a_device() -> None:
    code = """
import logging, sys
from rlxf.platform import get_platform
logger = logging.getLogger("torch.utils.cpp_extension")
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("before")
get_platform("cpu").prepare_megatron()
import megatron.core.distributed
logger.warning("No CUDA runtime is found, using CUDA_HOME='/usr'")
logger.error("something is wrong")
"""
    assert run(code).splitlines() == ["before", "something is wrong"]


def test_the_cpu_bridge_works_after_another_library_imported_megatron() -> None:
    code = """
import megatron.core.tensor_parallel.random as early
from rlxf.platform import get_platform, Process
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel
platform = get_platform("cpu")
print(init_parallel(platform, Process(), sizes=ParallelSizes(), seed=1, timeout_s=60).device)
"""
    assert run(code) == "cpu"


def test_megatron_brings_no_logger_and_no_compiler_into_a_process() -> None:
    """Each takes every worker half a second to import; wandb leaves folders behind in one that is killed."""
    code = """
import importlib, sys
from rlxf.platform import get_platform, Process
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel
init_parallel(get_platform("cpu"), Process(), sizes=ParallelSizes(), seed=1, timeout_s=60)
import rlxf.models.megatron.model, rlxf.models.megatron.optimizer
costly = ("wandb", "torch.utils.tensorboard", "torch._dynamo")
print([name for name in costly if name in sys.modules], importlib.import_module(costly[1]).__name__)
"""
    assert run(code) == "[] torch.utils.tensorboard"


def test_a_fork_of_the_random_state_leaves_the_outer_state_alone() -> None:
    code = """
import torch
from rlxf.platform import get_platform, Process
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel
init_parallel(get_platform("cpu"), Process(), sizes=ParallelSizes(), seed=1, timeout_s=60)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
with get_cuda_rng_tracker().fork(): first = torch.rand(3)
assert torch.equal(torch.rand(3), expected)
with get_cuda_rng_tracker().fork(): second = torch.rand(3)
assert not torch.equal(first, second)
print("kept")
"""
    assert run(code) == "kept"
