"""NVIDIA GPUs: nccl, megatron-core as it comes."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.platform.attention import AttentionBlocks, attention_by_block
from rlxf.platform.base import LogitChunks
from rlxf.platform.compiled import CompiledElementwise
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.linear import Linear
from rlxf.platform.links import DeviceLinks, Links

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend, Store

log = logging.getLogger(__name__)

_GPUS = Path("/proc/driver/nvidia/gpus")  # of the driver: a folder for each device


def _nccl(store: Store, rank: int, size: int, timeout_s: float) -> Backend:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group: Backend = dist.ProcessGroupNCCL(store, rank, size, options)
    return group


def _pin(memory: Tensor) -> None:
    """Without it copies still work, at about a fifth of the speed; a limit of the system may refuse it."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(result) != 0:
        log.warning("weights travel through memory that cannot be pinned: cudaHostRegister says %s", result)


class CudaPlatform:
    """Training and the HF engine ran on one device; docs/platforms.md says what has not run yet."""

    name = "cuda"
    torch_device = "cuda"
    ray_resource = "GPU"
    visible_devices_variable: str | None = "CUDA_VISIBLE_DEVICES"
    collective_backend = "cpu:gloo,cuda:nccl"
    head_sizes: tuple[int, ...] | None = None
    kv_block_size = 16
    vllm_sampler: str | None = None
    weights_in_host_memory = False
    linear = Linear()
    elementwise: Elementwise = CompiledElementwise()
    logit_chunks = LogitChunks(elements=2**28, rows=2**13, columns=2**15)  # 1 GiB in fp32
    links: Links = DeviceLinks(_nccl, _pin)
    vllm_sleep_level: int | None = 2
    vllm_allocator: str | None = "vllm.device_allocator.cumem:CuMemAllocator"

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def device_name(self) -> str:
        # The driver's own file first: asking CUDA would initialise it in a process that may have no work for it.
        for file in sorted(_GPUS.glob("*/information")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("Model:"):
                    return line.removeprefix("Model:").strip()
        return str(torch.cuda.get_device_name())

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        # One connection keeps the order of communication and compute kernels, which Megatron's overlap relies on.
        return {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # torch.compile has four small functions to build; by default each worker starts up to 32 processes for it.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def rollout_environment(self, num_threads: int, kv_cache_gib: int, *, colocated: bool = False) -> dict[str, str]:
        return {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights reach the workers as they are
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }

    def prepare_megatron(self) -> None:
        return None

    def set_device(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def keep_freed_memory(self) -> None:
        return None

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def max_memory_allocated(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def total_memory(self) -> int:
        return int(torch.cuda.mem_get_info()[1])

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        if query.dtype not in (torch.bfloat16, torch.float16):  # FlashAttention has no kernels for others
            return attention_by_block(query, key, value, blocks, scale)
        longest_q, longest_kv = max(blocks.queries), max(blocks.keys)
        window = (-1, 0)  # causal, aligned at the end: everything before, nothing after
        out = varlen_attention()(
            query,
            key,
            value,
            blocks.cu_seqlens_q,
            blocks.cu_seqlens_kv,
            longest_q,
            longest_kv,
            scale=scale,
            window_size=window,
        )
        assert isinstance(out, Tensor)
        return out

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        return {"enforce_eager": False, "enable_sleep_mode": colocated}


@functools.cache
def varlen_attention() -> Callable[..., Any]:
    """torch's, for grouped heads: from 2.12 on they must be asked for, before they are taken as they come."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn
