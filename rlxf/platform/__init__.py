"""Device differences: npu, cuda and cpu behind one protocol. The only code that names a device."""

from __future__ import annotations

from rlxf.config.devices import find_device
from rlxf.config.kinds import CpuLinear
from rlxf.core.errors import ConfigError
from rlxf.platform.base import Platform, Process
from rlxf.platform.cpu import CpuPlatform
from rlxf.platform.cuda import CudaPlatform
from rlxf.platform.npu import NpuPlatform

__all__ = ["PLATFORMS", "Platform", "Process", "get_platform"]

PLATFORMS: dict[str, type[NpuPlatform] | type[CudaPlatform] | type[CpuPlatform]] = {
    "npu": NpuPlatform,
    "cuda": CudaPlatform,
    "cpu": CpuPlatform,
}


def get_platform(name: str = "auto", *, cpu_linear: CpuLinear = "auto") -> Platform:
    """The platform of that name; ``auto`` is the first of npu, cuda, cpu that this machine has.

    Args:
        name: ``training.device``.
        cpu_linear: ``training.cpu_linear``; only the cpu platform reads it.

    Raises:
        ConfigError: the name is unknown, or the named device is not there.
    """
    if name == "auto":
        usable = next(platform for kind in PLATFORMS if (platform := _make(kind, cpu_linear)).is_available())
        present = find_device()
        if usable.name != present:
            raise ConfigError(
                f"training.device = auto: this machine has a {present} device, but the installed PyTorch can use "
                f"{usable.name} only; install the {present} lane, or set training.device={usable.name}"
            )
        return usable
    if name not in PLATFORMS:
        raise ConfigError(f'training.device = "{name}": expected one of auto, {", ".join(PLATFORMS)}')
    platform = _make(name, cpu_linear)
    if not platform.is_available():
        raise ConfigError(
            f"training.device = {name}: this machine has no such device, or its PyTorch cannot use it; "
            f"install the {name} extra, or set training.device=auto"
        )
    return platform


def _make(name: str, cpu_linear: CpuLinear) -> Platform:
    return CpuPlatform(cpu_linear) if name == "cpu" else PLATFORMS[name]()
