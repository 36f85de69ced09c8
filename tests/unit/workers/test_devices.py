"""The environment of an engine that shares several devices, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.core.errors import PlacementError
from rlxf.platform import PLATFORMS
from tests.unit.workers.fakes import AtOnce, Process
from workers import crew as crew_module
from workers import devices as module
from workers.crew import Crew
from workers.devices import device_environment
from workers.pools import Slot


class Ray:
    """Answers the short tasks: the device in each bundle."""

    def __init__(self, names: list[list[str]]) -> None:
        self.names = names
        self.asked: list[dict[str, Any]] = []

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(options=self.options)

    def options(self, **options: Any) -> Any:
        self.asked.append(options)
        bundle = options["scheduling_strategy"].placement_group_bundle_index
        room = SimpleNamespace(names=lambda resource: self.names[bundle])
        return SimpleNamespace(remote=lambda resource: Process(room).make("names", (resource,)))


GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "0"))


def environment(
    monkeypatch: pytest.MonkeyPatch, names: list[list[str]], device: str, others: tuple[int, ...] = (1,)
) -> tuple[dict[str, str], Ray]:
    ray, platform = Ray(names), PLATFORMS[device]()
    monkeypatch.setattr(module, "ray", ray)
    slot = Slot(GROUP, 0, platform.ray_resource, 0.5, "a", others)
    return device_environment(slot, platform, AtOnce(), {"py_executable": "python"}), ray


@pytest.mark.parametrize(
    ("device", "variable"), [("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("cuda", "CUDA_VISIBLE_DEVICES")]
)
def test_an_engine_is_told_its_devices_and_ray_leaves_them(
    monkeypatch: pytest.MonkeyPatch, device: str, variable: str
) -> None:
    found, ray = environment(monkeypatch, [["6"], ["3"]], device)
    assert found == {variable: "6,3", f"RAY_EXPERIMENTAL_NOSET_{variable}": "1"}
    assert [options["scheduling_strategy"].placement_group_bundle_index for options in ray.asked] == [0, 1]
    assert {options["runtime_env"]["py_executable"] for options in ray.asked} == {"python"}
    taken = {options.get("num_gpus") or options["resources"][PLATFORMS[device].ray_resource] for options in ray.asked}
    assert taken == {0.0001}  # so that it fits beside the other roles


def test_ray_knows_the_switches() -> None:
    from ray._private.accelerators import npu, nvidia_gpu

    known = (npu.NOSET_ASCEND_RT_VISIBLE_DEVICES_ENV_VAR, nvidia_gpu.NOSET_CUDA_VISIBLE_DEVICES_ENV_VAR)
    assert known == tuple(f"{module._KEEP}{PLATFORMS[name].visible_devices_variable}" for name in ("npu", "cuda"))


def test_nothing_is_asked_and_set_on_a_cpu_or_with_one_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, others in (("cpu", (1,)), ("npu", ())):
        found, ray = environment(monkeypatch, [], device, others)
        assert (found, ray.asked) == ({}, [])


@pytest.mark.parametrize("names", [[["6"], []], [["6"], ["6"]], [["6", "7"], ["3"]]])
def test_devices_that_ray_does_not_tell_apart_are_an_error(
    monkeypatch: pytest.MonkeyPatch, names: list[list[str]]
) -> None:
    with pytest.raises(PlacementError, match=r"expected one device name from Ray for each.*resource_name=NPU"):
        environment(monkeypatch, names, "npu")


def test_the_process_of_an_engine_gets_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    monkeypatch.setattr(crew_module, "device_environment", lambda slot, *_: {"DEVICES": slot.node})
    monkeypatch.setattr(crew_module, "_environment", lambda *_: {"OTHER": "1", "DEVICES": "the user's"})
    crew: Any = object.__new__(Crew)
    crew._config = crew._platform = crew._waiter = None
    crew._watch = SimpleNamespace(run="run", follow=lambda name, **_: None)
    slot = Slot(GROUP, 0, "NPU", 0.5, "a", (1,))
    crew._slots, crew._starts = {"infer": [slot]}, {"infer": [0]}
    monkeypatch.setattr(crew_module, "ray", SimpleNamespace(remote=lambda worker: Starter(started)))
    crew._start("infer", 0)
    assert started[0]["runtime_env"]["env_vars"] == {"OTHER": "1", "DEVICES": "a"}


class Starter:
    """A worker's class to Ray: notes with which options it is started."""

    def __init__(self, started: list[dict[str, Any]]) -> None:
        self.started = started

    def options(self, **options: Any) -> Starter:
        self.started.append(options)
        return self

    def remote(self, *given: Any) -> Process:
        return Process(None)
