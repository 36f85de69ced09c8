"""What a core of this machine computes, measured in less than a second: figures of the planner's device ``cpu``."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from rlxf.config.kinds import CpuLinear
from rlxf.core.memory import GIB, machine_memory
from rlxf.platform.linear import Linear, cpu_linear

_ROWS, _INPUTS, _OUTPUTS = 512, 512, 1408  # of a product: a pass through the feed-forward block of a 26M model
_REPEATS = 5
_ENOUGH_S = 0.1  # of one product; without AVX-512 one in bf16 takes as long
_COPIED = 2**26  # bytes: more than the caches of a core hold


@functools.lru_cache
def probe_cpu(choice: CpuLinear = "auto") -> Mapping[str, float]:
    """The figures of this machine, measured once per process, by their names in a file of ``configs/rlxf/device``.

    Of one core: ``fp32_tflops`` and ``bf16_tflops`` of dense products, through the library that ``training.cpu_linear``
    names, and ``memory_gb_per_s`` of a copy, read and written. ``memory_gib`` is what all processes of this machine, or
    of its control group, can have.

    Rates come from CPU time of this thread, so that other processes that want the core do not count; those that share
    its caches and its clock do.

    Args:
        choice: ``training.cpu_linear``.

    Raises:
        ConfigError: oneDNN is asked for, and this PyTorch is built without it.
    """
    linear = cpu_linear(choice)
    with _one_thread(), torch.inference_mode():
        return {
            "fp32_tflops": _product_tflops(linear, torch.float32),
            "bf16_tflops": _product_tflops(linear, torch.bfloat16),
            "memory_gb_per_s": _copy_gb_per_s(),
            "memory_gib": machine_memory().limit / GIB,
        }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _product_tflops(linear: Linear, dtype: torch.dtype) -> float:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _INPUTS, generator=draw).to(dtype)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=draw).to(dtype)
    return 2e-12 * _ROWS * _INPUTS * _OUTPUTS / _seconds(lambda: linear.output(x, weight))


def _copy_gb_per_s() -> float:
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.ones_like(source)  # written, so that its pages exist
    return 2e-9 * _COPIED / _seconds(lambda: target.copy_(source))


def _seconds(call: Callable[[], object]) -> float:
    """Median CPU seconds of this thread; fewer calls of a slow one. The first does not count: it makes the kernel."""
    call()
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _ENOUGH_S:
        begin = time.thread_time()
        call()
        found.append(time.thread_time() - begin)
    return statistics.median(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in the calling thread alone, whose time is what is read."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
