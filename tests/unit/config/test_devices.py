"""Which kind of device a machine has, by the files of its drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlxf.config.devices import find_device


@pytest.mark.parametrize(
    ("files", "device"),
    [
        ((), "cpu"),
        (("nvidia0", "nvidiactl"), "cuda"),
        (("nvidia3", "nvidiactl", "nvidia-uvm"), "cuda"),  # a container that was given one GPU of eight
        (("nvidia12",), "cuda"),
        (("dxg",), "cuda"),
        (("nvidiactl", "nvidia-uvm"), "cpu"),  # a driver, and no GPU that one may use
        (("davinci5", "davinci_manager"), "npu"),
        (("davinci_manager",), "npu"),
        (("nvidia0", "davinci0"), "npu"),
    ],
)
def test_a_device_is_found_whatever_its_number(tmp_path: Path, files: tuple[str, ...], device: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert find_device(tmp_path) == device
