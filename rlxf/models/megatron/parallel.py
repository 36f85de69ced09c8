"""A role's group of processes: torch.distributed, megatron's parallel state, and this rank's place in it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.errors import ConfigError
from rlxf.platform.base import Platform, Process


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """This rank's place in its role: index and size of each parallel axis, and the device it works on."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def init_parallel(platform: Platform, process: Process, *, tp_size: int, seed: int, timeout_s: int) -> Layout:
    """Join the role's process group and lay the parallel axes over it; a second role in one process reuses them.

    Args:
        platform: the device; its megatron bridge is installed here.
        process: rank and rendezvous of this process.
        tp_size: tensor parallel size; must divide ``process.world_size``.
        seed: of megatron's random states.
        timeout_s: longest wait in one collective call, seconds; a lost peer is noticed at the latest then.

    Raises:
        ConfigError: the sizes do not fit, or this process already works in another layout.
    """
    platform.prepare_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if process.world_size % tp_size:
        raise ConfigError(
            f"tensor_model_parallel_size = {tp_size} must divide the {process.world_size} processes of its pool"
        )
    device = platform.set_device(process.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            platform.collective_backend,
            init_method=f"tcp://{process.master_addr}:{process.master_port or free_port()}",
            rank=process.rank,
            world_size=process.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size, distributed_timeout_minutes=max(1, timeout_s // 60)
        )
        model_parallel_cuda_manual_seed(seed)
    if dist.get_world_size() != process.world_size or parallel_state.get_tensor_model_parallel_world_size() != tp_size:
        raise ConfigError("roles that share one process must have the same number of processes and parallel sizes")
    return Layout(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


def sum_over_data_parallel(values: Tensor, layout: Layout) -> Tensor:
    """``values`` summed over the data-parallel ranks, on the CPU.

    The sum runs on the CPU too: every platform's backend has gloo for it, and HCCL has no float64 sum.
    """
    total = values.cpu()
    if layout.dp_size > 1:
        from megatron.core import parallel_state

        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total
