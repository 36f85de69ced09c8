"""The whole NPU platform on a CPU: every call of ``torch_npu`` goes to the twin in ``tests/npu/twin``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.platform.megatron_cpu import install
from rlxf.platform.npu import NpuPlatform

TWIN = Path(__file__).parent / "npu" / "twin"


class NpuOnCpu(NpuPlatform):
    """``NpuPlatform`` with tensors in host memory and gloo: a CPU build of torch knows no device ``npu``.

    All else is the platform's own code: the megatron bridge, attention, fused operations, optimizer kernel, memory
    calls. It cannot show what a kernel computes, how fast, and in how much memory; nor what a stream, HCCL, the
    transfer of ``torch.cuda`` or a tensor on a device does.
    """

    torch_device = "cpu"
    collective_backend = "gloo"

    def set_device(self, local_rank: int) -> torch.device:
        super().set_device(local_rank)
        return torch.device("cpu")


def install_twin(patch: pytest.MonkeyPatch) -> Any:
    """The module ``torch_npu``, importable and in place of ATen's optimizer kernel until ``patch`` is undone."""
    install()  # before what it replaces in torch is saved, so that undoing keeps it
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_npu"]:
        patch.delitem(sys.modules, name)
    patch.syspath_prepend(str(TWIN))
    patch.setattr(torch.Tensor, "type", torch.Tensor.type)
    module = importlib.import_module("torch_npu")
    patch.setattr(torch, "_fused_adamw_", module._fused_adamw_)
    return module


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The twin, for one test."""
    yield install_twin(monkeypatch)
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_npu"]:
        del sys.modules[name]
