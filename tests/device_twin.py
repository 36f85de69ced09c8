"""A platform that stands for one with devices, on a CPU: its memory is opened by handles, by processes on one device.

The memory is real and shared between processes; that a handle opens it only on the device where it was made is checked
as strictly as a device does it. What it cannot show: streams, the order of kernels, and what a handle of real memory
costs.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.platform.cpu import CpuPlatform
from rlxf.platform.links import Copies, HostLinks
from rlxf.platform.visible import visible_device

VISIBLE = "TWIN_VISIBLE_DEVICES"


@dataclass(frozen=True)
class TwinHandle:
    device: str | None
    memory: bytes


class TwinLinks(HostLinks):
    """Handles, and copies that end only when somebody waits for them."""

    shares_devices = True

    def share(self, memory: Tensor) -> TwinHandle:
        torch.multiprocessing.set_sharing_strategy("file_system")
        memory.share_memory_()
        out = io.BytesIO()
        ForkingPickler(out).dump(memory)
        return TwinHandle(visible_device(TwinPlatform(), 0), out.getvalue())

    def open(self, handle: TwinHandle, device: torch.device) -> Tensor:
        here = visible_device(TwinPlatform(), device.index or 0)
        if handle.device != here:
            raise SyncError(f"a handle of device {handle.device} was opened on device {here}")
        opened: Tensor = pickle.loads(handle.memory)
        return opened

    def copy_beside(self, sources: list[Tensor], targets: list[Tensor]) -> Copies:  # type: ignore[override]
        return LateCopies(sources, targets)


class LateCopies(Copies):
    """Made at the last moment: whoever changes the sources before gets them wrong."""

    def __init__(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        self._left = list(zip(sources, targets, strict=True))

    def before_changes(self) -> None:
        for source, target in self._left:
            target.copy_(source)
        self._left.clear()

    def wait(self) -> None:
        self.before_changes()
        self.seconds = 0.25


class TwinPlatform(CpuPlatform):
    weights_in_host_memory = False
    visible_devices_variable: str | None = VISIBLE
    links = TwinLinks()
