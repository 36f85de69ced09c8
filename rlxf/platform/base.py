"""What the rest of the program may ask of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.linear import Linear
from rlxf.platform.links import Links


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Place of this process in its role's group of processes; every role (actor, ref, reward) is a group of its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among this process's visible devices
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # unused by a group of one
    listen_fd: int | None = None  # rank 0: a socket that listens at master_port, so that nobody else can take it


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitChunks:
    """How much of a head's logits, [tokens, vocabulary], exists at a time."""

    elements: int = 2**21  # in fp32: 8 MiB, which stays in a CPU's cache
    rows: int = 1024  # at most
    columns: int | None = None  # about as many, whatever the rows; None: as many as ``elements`` leaves


class Platform(Protocol):
    """One kind of device. Values first, then the few things that must be done differently."""

    name: str  # "npu", "cuda" or "cpu"
    torch_device: str  # what torch calls it
    ray_resource: str  # "NPU", "GPU" or "CPU"
    visible_devices_variable: str | None  # environment variable that limits a process to its devices
    collective_backend: str  # of torch.distributed
    head_sizes: tuple[int, ...] | None  # that the rollout engine's attention has kernels for; None = any
    kv_block_size: int  # tokens per block of the rollout engine's KV cache
    vllm_sampler: str | None  # module in which vLLM's plugin draws a row at a time; None: vLLM draws fast enough
    weights_in_host_memory: bool  # of trainer and engine, so that processes of one machine can share them
    linear: Linear  # linear layers, and the products of hand-written backward passes
    elementwise: Elementwise  # norms, rotations, gates, and the softmax of the head
    logit_chunks: LogitChunks
    links: Links  # between processes
    vllm_sleep_level: int | None  # how deep a vLLM engine sleeps: 2 drops the weights, 1 keeps a host copy; None: never
    vllm_allocator: str | None  # module and class of vLLM's allocator for memory that sleeps

    def is_available(self) -> bool:
        """Whether this machine has such a device and the software for it."""
        ...

    def device_name(self) -> str:
        """What the driver calls this machine's first device, such as ``NVIDIA H100 80GB HBM3``; empty: it has no name.

        The Ascend names say how much memory a device has, as the others do.
        """
        ...

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        """Environment variables that a worker process needs before torch is imported."""
        ...

    def rollout_environment(self, num_threads: int, kv_cache_gib: int, *, colocated: bool = False) -> dict[str, str]:
        """The same for a process that holds a vLLM engine; ``colocated``: on a device that it shares with training."""
        ...

    def prepare_megatron(self) -> None:
        """Make megatron-core importable and usable on this device; call before the first import of it."""
        ...

    def set_device(self, local_rank: int) -> torch.device:
        """Bind this process to one of its visible devices."""
        ...

    def synchronize(self) -> None: ...

    def keep_freed_memory(self) -> None:
        """What an update frees stays with this process for the next one, as a device's allocator does by itself."""
        ...

    def empty_cache(self) -> None:
        """Give memory that was freed back to the device (cpu: to the system), for other processes."""
        ...

    def max_memory_allocated(self) -> int:
        """Peak memory of this process on its device, bytes (cpu: peak resident memory)."""
        ...

    def reset_peak_memory(self) -> None:
        """``max_memory_allocated`` counts from here on (cpu: it goes on)."""
        ...

    def free_memory(self) -> int:
        """What is free now of ``total_memory``, bytes; 0: it has none of its own."""
        ...

    def total_memory(self) -> int:
        """All memory of this process's device, bytes; 0: it has none of its own."""
        ...

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        """[T, heads, d] causal attention of packed blocks, aligned at the end of each.

        A block's last query sees all keys of the block, the one before all but the last, and so on.

        Args:
            query: [T, heads, d].
            key, value: [S, kv_heads, d].
            blocks: which rows see which.
            scale: of the scores.
        """
        ...

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that depend on the device, unless the recipe sets them.

        ``colocated``: the engine shares the device with training.
        """
        ...
