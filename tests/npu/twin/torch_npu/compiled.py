"""``torch_npu._C``: of what is compiled, only the process group's construction."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

from torch._C._distributed_c10d import Store

from . import npu
from .checks import CALLS, need


class _Options:
    """Those that the platform leaves alone have their defaults."""

    __slots__ = ("_timeout",)

    def __init__(self) -> None:
        self._timeout = timedelta(minutes=30)


class ProcessGroupHCCL:
    """Nothing is sent: what HCCL does stays untested."""

    Options = _Options

    def __init__(self, store: Store, rank: int, size: int, options: _Options) -> None:
        CALLS["ProcessGroupHCCL"] += 1
        need(npu._device is not None, "ProcessGroupHCCL before set_device: it would use device 0")
        need(isinstance(store, Store), f"store is a {type(store).__name__}")
        need(type(rank) is int and type(size) is int and 0 <= rank < size, f"rank = {rank!r} of {size!r}")
        need(isinstance(options, _Options), f"options is a {type(options).__name__}")
        need(isinstance(options._timeout, timedelta), f"_timeout is a {type(options._timeout).__name__}")
        need(options._timeout > timedelta(0), f"_timeout = {options._timeout}")
        self.rank, self.size, self.timeout_s = rank, size, options._timeout.total_seconds()


_distributed_c10d = SimpleNamespace(ProcessGroupHCCL=ProcessGroupHCCL)
