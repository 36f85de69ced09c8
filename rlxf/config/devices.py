"""What the checks of a recipe must know about devices before torch is imported. The rest is in ``rlxf/platform``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One kind of device."""

    ray_resource: str  # Ray's name for one of them
    device_files: tuple[str, ...]  # patterns in /dev; its driver makes one of them; none: every machine has this kind
    ray_start_option: str  # declares `{count}` of them to `ray start`
    vllm_is_one_process: bool = False  # then nothing else may run in that process
    vllm_sleeps: bool = True  # an engine can give its memory to others that share the device
    has_bitsandbytes: bool = True  # kernels for 4-bit weights
    head_sizes: tuple[int, ...] | None = None  # that vLLM's attention has kernels for; None = any


DEVICES = {
    "npu": DeviceFacts(
        "NPU", ("davinci[0-9]*", "davinci_manager"), """--resources='{{"NPU": {count}}}'""", has_bitsandbytes=False
    ),
    "cuda": DeviceFacts("GPU", ("nvidia[0-9]*", "dxg"), "--num-gpus={count}"),
    "cpu": DeviceFacts(
        "CPU",
        (),
        "--num-cpus={count}",
        vllm_is_one_process=True,
        vllm_sleeps=False,
        head_sizes=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),
    ),
}

SYNONYMS = {"gpu": "cuda", "nvidia": "cuda", "ascend": "npu"}  # what people write for `training.device`


def find_device(folder: Path = Path("/dev")) -> str:
    """The first of npu, cuda and cpu whose driver is on this machine. A container may have any of the devices."""
    for name, facts in DEVICES.items():
        if not facts.device_files or any(next(folder.glob(pattern), None) for pattern in facts.device_files):
            return name
    raise AssertionError("cpu needs no device file")


def device_facts(device: str) -> DeviceFacts:
    """The facts of ``training.device``."""
    return DEVICES[find_device() if device == "auto" else device]
