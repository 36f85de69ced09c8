"""What the checks of a recipe must know about devices before torch is imported. The rest is in ``rlxf/platform``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One kind of device."""

    ray_resource: str  # Ray's name for one of them
    device_files: tuple[str, ...]  # the driver makes the first of them; none for the kind that every machine has
    ray_start_option: str  # declares `{count}` of them to `ray start`
    vllm_is_one_process: bool = False  # then nothing else may run in that process
    has_bitsandbytes: bool = True  # kernels for 4-bit weights
    head_sizes: tuple[int, ...] | None = None  # that vLLM's attention has kernels for; None = any


DEVICES = {
    "npu": DeviceFacts(
        "NPU", ("/dev/davinci0", "/dev/davinci_manager"), """--resources='{{"NPU": {count}}}'""", has_bitsandbytes=False
    ),
    "cuda": DeviceFacts("GPU", ("/dev/nvidia0", "/dev/dxg"), "--num-gpus={count}"),
    "cpu": DeviceFacts(
        "CPU", (), "--num-cpus={count}", True, head_sizes=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    ),
}

SYNONYMS = {"gpu": "cuda", "nvidia": "cuda", "ascend": "npu"}  # what people write for `training.device`


def find_device() -> str:
    """The first of npu, cuda and cpu whose driver is on this machine."""
    for name, facts in DEVICES.items():
        if not facts.device_files or any(Path(file).exists() for file in facts.device_files):
            return name
    raise AssertionError("cpu needs no device file")


def device_facts(device: str) -> DeviceFacts:
    """The facts of ``training.device``."""
    return DEVICES[find_device() if device == "auto" else device]
