"""``torch_npu.npu``: one device with 64 GiB, of which nothing is used."""

from __future__ import annotations

from .checks import CALLS, need

_TOTAL = 64 * 2**30
_device: int | None = None


def is_available() -> bool:
    CALLS["npu.is_available"] += 1
    return True


def set_device(device: int) -> None:
    global _device
    CALLS["npu.set_device"] += 1
    need(type(device) is int and device >= 0, f"device = {device!r}")
    _device = device


def _on_device(name: str) -> None:
    CALLS[f"npu.{name}"] += 1
    need(_device is not None, f"{name} before set_device: it would make a context on device 0")


def synchronize() -> None:
    _on_device("synchronize")


def empty_cache() -> None:
    _on_device("empty_cache")


def max_memory_allocated() -> int:
    _on_device("max_memory_allocated")
    return 0


def reset_peak_memory_stats() -> None:
    _on_device("reset_peak_memory_stats")


def mem_get_info() -> tuple[int, int]:
    """Free and total bytes."""
    _on_device("mem_get_info")
    return _TOTAL, _TOTAL
