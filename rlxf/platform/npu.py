"""Ascend NPUs: hccl, megatron-core through torch_npu's transfer layer. Not yet run on hardware.

Written against torch-npu 2.10.0 and its sources; ``tests/npu`` looks up the names used here in the wheel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.base import LogitChunks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.environment import NO_EXPANDABLE_SEGMENTS
from rlxf.platform.linear import Linear
from rlxf.platform.links import DeviceLinks, Links

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend, Store

# Of npu_fusion_attention, as torch-npu documents it.
_CAUSAL_MASK_SIZE = 2048  # the compressed causal mask that it expects with sparse_mode 3
_MAX_SEQUENCES = 1024  # in the lists of lengths of one call with layout TND


# Names of the driver, and what people call these devices. The variants of a 910B differ in memory and clock.
_NAMES = {
    r"Ascend910B[123]": "Ascend 910B 64GB",
    r"Ascend910B4": "Ascend 910B 32GB",
    r"Ascend910_93\d\d": "Ascend 910C 64GB",
}

# Every role is a group of processes of its own. HCCL's processes of one device would all listen at the same port.
_PORTS = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}


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


def _hccl(store: Store, rank: int, size: int, timeout_s: float) -> Backend:
    hccl = _torch_npu()._C._distributed_c10d.ProcessGroupHCCL
    options = hccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group: Backend = hccl(store, rank, size, options)
    return group


class NpuPlatform:
    """The first target. ``prepare_megatron`` must run before megatron-core is imported."""

    name = "npu"
    torch_device = "npu"
    ray_resource = "NPU"
    visible_devices_variable: str | None = "ASCEND_RT_VISIBLE_DEVICES"
    collective_backend = "cpu:gloo,npu:hccl"
    head_sizes: tuple[int, ...] | None = None
    kv_block_size = 128
    vllm_sampler: str | None = "vllm_ascend.sample.sampler"
    weights_in_host_memory = False
    linear = Linear()
    elementwise: Elementwise = NpuElementwise()
    logit_chunks = LogitChunks(elements=2**27, rows=2**12, columns=2**15)  # 512 MiB in fp32
    links: Links = DeviceLinks(_hccl)
    # Level 2 restores named buffers, and vllm-ascend keeps its tables of angles elsewhere.
    vllm_sleep_level: int | None = 1
    vllm_allocator: str | None = "vllm_ascend.device_allocator.camem:CaMemAllocator"

    def is_available(self) -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        return bool(_torch_npu().npu.is_available())

    def device_name(self) -> str:
        # CANN's own module: torch_npu would make a context on a device that this process may have no work for.
        if importlib.util.find_spec("acl") is None:
            return ""
        name = str(importlib.import_module("acl").get_soc_name())
        return next((plain for pattern, plain in _NAMES.items() if re.fullmatch(pattern, name)), name)

    def worker_environment(self, num_threads: int) -> dict[str, str]:
        return {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            **_PORTS,
            "HCCL_CONNECT_TIMEOUT": "1800",
            "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
            "TASK_QUEUE_ENABLE": "2",
            "CPU_AFFINITY_CONF": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def rollout_environment(self, num_threads: int, kv_cache_gib: int, *, colocated: bool = False) -> dict[str, str]:
        # An engine with a device of its own gets segments that grow from vllm-ascend, unless the user chose otherwise.
        segments = {"PYTORCH_NPU_ALLOC_CONF": NO_EXPANDABLE_SEGMENTS} if colocated else {}
        # NZ is a private weight layout; loading Hugging Face weights in place needs the plain one.
        return {
            **_PORTS,
            **segments,
            "HCCL_OP_EXPANSION_MODE": "AIV",  # small collectives by the vector cores, as vllm-ascend advises
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
        return torch.device(self.torch_device, local_rank)

    def synchronize(self) -> None:
        _torch_npu().npu.synchronize()

    def keep_freed_memory(self) -> None:
        return None

    def empty_cache(self) -> None:
        _torch_npu().npu.empty_cache()

    def max_memory_allocated(self) -> int:
        return int(_torch_npu().npu.max_memory_allocated())

    def reset_peak_memory(self) -> None:
        _torch_npu().npu.reset_peak_memory_stats()

    def free_memory(self) -> int:
        return int(_torch_npu().npu.mem_get_info()[0])

    def total_memory(self) -> int:
        return int(_torch_npu().npu.mem_get_info()[1])

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, scale: float
    ) -> Tensor:
        pieces = [
            self._attention_call(q, k, v, part, scale)
            for (q, k, v), part in _calls_of_at_most(_MAX_SEQUENCES, query, key, value, blocks)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _attention_call(
        self, query: Tensor, key: Tensor, value: Tensor, sizes: tuple[Sequence[int], Sequence[int]], scale: float
    ) -> Tensor:
        queries, keys = sizes
        out: Tensor = _torch_npu().npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=_causal_mask(query.device),
            scale=scale,
            actual_seq_qlen=list(accumulate(queries)),
            actual_seq_kvlen=list(accumulate(keys)),
            sparse_mode=3,  # causal, aligned at the end
        )[0]
        return out

    def vllm_arguments(self, *, colocated: bool) -> dict[str, Any]:
        return {
            "enforce_eager": False,
            "enable_sleep_mode": colocated,
            "additional_config": {"weight_nz_mode": 0} | (extra_cleanup(_ascend_config()) if colocated else {}),
        }


def extra_cleanup(ascend_config: str) -> dict[str, Any]:
    """What makes an engine give back HCCL's groups and its graphs when it sleeps, too.

    Args:
        ascend_config: source of ``vllm_ascend/ascend_config.py``. Newer versions renamed the key, and refuse keys that
            they do not know.
    """
    if "class RlConfig" in ascend_config:
        return {"rl_config": {"enabled": True, "sleep_mode_extra_cleanup": True}}
    return {"enable_sleep_mode_extra_cleanup": True}


def _ascend_config() -> str:
    """The installed source; empty without vllm-ascend. Read, not imported: that would load vLLM."""
    spec = importlib.util.find_spec("vllm_ascend")
    if spec is None or spec.origin is None:
        return ""
    return (Path(spec.origin).parent / "ascend_config.py").read_text(encoding="utf-8")


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def _calls_of_at_most(
    count: int, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], tuple[Sequence[int], Sequence[int]]]]:
    """The rows of each ``count`` blocks, and the blocks' sizes; no copies."""
    first = start = 0
    for begin in range(0, len(blocks.queries), count):
        queries, keys = blocks.queries[begin : begin + count], blocks.keys[begin : begin + count]
        end, stop = first + sum(queries), start + sum(keys)
        yield (query[first:end], key[start:stop], value[start:stop]), (queries, keys)
        first, start = end, stop


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
