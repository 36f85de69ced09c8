"""What the rest of the program may ask of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlxf.platform.linear import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Place of this process in its role's group of processes; every role (actor, ref, reward) is a group of its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among this process's visible devices
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # unused by a group of one
    listen_fd: int | None = None  # rank 0: a socket that listens at master_port, so that nobody else can take it


class Platform(Protocol):
    """One kind of device. Values first, then the few things that must be done differently."""

    name: str  # "npu", "cuda" or "cpu"
    torch_device: str  # what torch calls it
    ray_resource: str  # "NPU", "GPU" or "CPU"
    visible_devices_variable: str | None  # environment variable that limits a process to its devices
    collective_backend: str  # of torch.distributed
    head_sizes: tuple[int, ...] | None  # that the rollout engine's attention has kernels for; None = any
    kv_block_size: int  # tokens per block of the rollout engine's KV cache
    weights_in_host_memory: bool  # of trainer and engine, so that processes of one machine can share them
    linear: Linear  # linear layers, and the products of hand-written backward passes

    def is_available(self) -> bool:
        """Whether this machine has such a device and the software for it."""
        ...

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        """Environment variables that a worker process needs before torch is imported."""
        ...

    def rollout_environment(self, num_threads: int, kv_cache_gib: int) -> dict[str, str]:
        """The same for a process that holds a vLLM engine."""
        ...

    def prepare_megatron(self) -> None:
        """Make megatron-core importable and usable on this device; call before the first import of it."""
        ...

    def set_device(self, local_rank: int) -> torch.device:
        """Bind this process to one of its visible devices."""
        ...

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...

    def max_memory_allocated(self) -> int:
        """Peak memory of this process on its device, bytes (cpu: peak resident memory)."""
        ...

    def total_memory(self) -> int:
        """All memory of this process's device, bytes; 0: it has none of its own."""
        ...

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, scale: float
    ) -> Tensor:
        """[T, heads, d] causal attention of packed blocks, aligned at the end of each.

        A block's last query sees all keys of the block, the one before all but the last, and so on.

        Args:
            query: [T, heads, d]; block ``i`` has rows ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``.
            key, value: [S, kv_heads, d]; block ``i`` has rows ``cu_seqlens_kv[i]`` to ``cu_seqlens_kv[i + 1]``, at
                least as many as queries.
            cu_seqlens_q, cu_seqlens_kv: [blocks + 1] int32.
            scale: of the scores.
        """
        ...

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that depend on the device, unless the recipe sets them.

        ``colocated``: the engine shares the device with training.
        """
        ...
