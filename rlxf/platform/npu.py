"""Ascend NPUs: hccl, megatron-core through torch_npu's transfer layer. Not yet run on hardware.

Written against torch-npu 2.10.0 and its sources; ``tests/npu`` looks up the names used here in the wheel.
"""

from __future__ import annotations

import functools
import importlib.util
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.base import LogitChunks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.linear import Linear

_CAUSAL_MASK_SIZE = 2048  # the compressed causal mask that npu_fusion_attention expects with sparse_mode 3


class NpuElementwise(Elementwise):
    """Norm, rotation and gate by one kernel each, with its own backward. Not yet run on hardware."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = _torch_npu().npu_rms_norm(x, weight, epsilon=eps)[0]
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Layout SBND with a batch of 1; the angles are S11D.
        out: Tensor = _torch_npu().npu_rotary_mul(x.unsqueeze(1), cos.unsqueeze(1), sin.unsqueeze(1))
        return out.squeeze(1)

    def swiglu(self, x: Tensor) -> Tensor:
        out: Tensor = _torch_npu().npu_swiglu(x, dim=-1)
        return out


class NpuPlatform:
    """The first target. ``prepare_megatron`` must run before megatron-core is imported."""

    name = "npu"
    torch_device = "npu"
    ray_resource = "NPU"
    visible_devices_variable: str | None = "ASCEND_RT_VISIBLE_DEVICES"
    collective_backend = "cpu:gloo,npu:hccl"
    head_sizes: tuple[int, ...] | None = None
    kv_block_size = 128
    weights_in_host_memory = False
    linear = Linear()
    elementwise: Elementwise = NpuElementwise()
    logit_chunks = LogitChunks(elements=2**27, rows=2**12, columns=2**15)  # 512 MiB in fp32

    def is_available(self) -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        return bool(_torch_npu().npu.is_available())

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        return {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "HCCL_CONNECT_TIMEOUT": "1800",
            "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
            "TASK_QUEUE_ENABLE": "2",
            "CPU_AFFINITY_CONF": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def rollout_environment(self, num_threads: int, kv_cache_gib: int) -> dict[str, str]:
        # NZ is a private weight layout; loading Hugging Face weights in place needs the plain one.
        return {
            "VLLM_ASCEND_ENABLE_NZ": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights reach the workers as they are
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def prepare_megatron(self) -> None:
        _torch_npu()
        importlib.import_module(
            "torch_npu.contrib.transfer_to_npu"
        )  # torch.cuda, nccl, device="cuda" -> their NPU twins
        _make_type_strings_look_like_cuda()

    def set_device(self, local_rank: int) -> torch.device:
        _torch_npu().npu.set_device(local_rank)
        return torch.device("npu", local_rank)

    def synchronize(self) -> None:
        _torch_npu().npu.synchronize()

    def empty_cache(self) -> None:
        _torch_npu().npu.empty_cache()

    def max_memory_allocated(self) -> int:
        return int(_torch_npu().npu.max_memory_allocated())

    def total_memory(self) -> int:
        return int(_torch_npu().npu.mem_get_info()[1])

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        out: Tensor = _torch_npu().npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=_causal_mask(query.device),
            scale=scale,
            actual_seq_qlen=list(accumulate(blocks.queries)),
            actual_seq_kvlen=list(accumulate(blocks.keys)),
            sparse_mode=3,  # causal, aligned at the end
        )[0]
        return out

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        return {
            "enforce_eager": False,
            "enable_sleep_mode": colocated,
            "additional_config": {"weight_nz_mode": 0},
        }


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


@functools.lru_cache
def _causal_mask(device: torch.device) -> Tensor:
    size = _CAUSAL_MASK_SIZE
    return torch.triu(torch.ones(size, size, dtype=torch.bool, device=device), diagonal=1)


def _make_type_strings_look_like_cuda() -> None:
    """Megatron's optimizers compare ``param.type()`` with CUDA type strings, which transfer_to_npu leaves alone."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def typed(self: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is not None:
            return original(self, dtype, non_blocking)
        name = original(self)
        return name.replace("npu", "cuda") if isinstance(name, str) else name

    torch.Tensor.type = typed  # type: ignore[method-assign, assignment]
