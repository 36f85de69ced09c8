"""Importing it makes ``torch.cuda`` mean the accelerator. Here the accelerator is the CPU, by the CPU lane's bridge.

``Tensor.type`` stays what a device tensor of torch_npu says, ``torch.npu.FloatTensor``: the real module leaves it
alone, too, and megatron-core compares it with names of CUDA types.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlxf.platform.megatron_cpu import install
from torch_npu.checks import CALLS

CALLS["contrib.transfer_to_npu"] += 1
install()
_original = torch.Tensor.type


@functools.wraps(_original)
def _typed(self: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is not None:
        return _original(self, dtype, non_blocking)
    name = _original(self)
    return name.replace("torch.", "torch.npu.") if isinstance(name, str) and name.count(".") == 1 else name


torch.Tensor.type = _typed  # type: ignore[method-assign, assignment]
