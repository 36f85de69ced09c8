"""Engines that sleep on the trainer's devices: each is called once, also where some are lost; and who loads first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.core.errors import WorkerLost
from rlxf.rollout.engine import WeightState
from tests.unit.workers.fakes import AtOnce, Process, member
from workers.group import WorkerGroup
from workers.launch import load
from workers.sleeping import Sleepers


class World:
    def __init__(self, *dies_in: list[str]) -> None:
        self.processes = [Process(WeightState(), methods) for methods in dies_in]
        members = [member(process, rank) for rank, process in enumerate(self.processes)]
        self.sleepers = Sleepers(WorkerGroup(members, AtOnce()))

    def replace(self, rank: int) -> None:
        self.processes[rank].room, self.processes[rank].dead = WeightState(), False
        self.sleepers.are_new([rank])

    def states(self) -> list[str]:
        return [process.room.state.value for process in self.processes]


def test_engines_sleep_and_wake_once() -> None:
    world = World([], [])
    assert world.sleepers.sleep({0, 1}) == {}
    assert world.sleepers.sleep({0, 1}) == {}  # they do already
    world.sleepers.wake_weights()
    world.sleepers.wake_weights()
    for process in world.processes:
        process.room.begin()
        process.room.end(1)
    world.sleepers.wake_cache()
    world.sleepers.wake_cache()
    assert world.states() == ["ready", "ready"]
    assert world.processes[0].calls == ["sleep", "wake_weights", "wake_cache"]


def test_one_that_is_lost_while_the_others_sleep_is_told_and_counts_as_awake() -> None:
    world = World([], ["sleep"], [])
    assert [str(error) for error in world.sleepers.sleep({0, 1, 2}).values()] == ["lost rank 1 on node a during sleep"]
    assert world.sleepers.asleep == {0, 2}
    world.replace(1)
    assert world.sleepers.sleep({0, 1, 2}) == {}
    assert world.states() == ["asleep"] * 3


@pytest.mark.parametrize("method", ["wake_weights", "wake_cache"])
def test_a_wake_in_which_one_is_lost_can_be_made_again(method: str) -> None:
    world = World([], [method])

    def wake() -> None:
        world.sleepers.wake_weights()
        for process in world.processes:
            process.room.begin()
            process.room.end(1)
        world.sleepers.wake_cache()

    world.sleepers.sleep({0, 1})
    with pytest.raises(WorkerLost, match=f"lost rank 1 on node a during {method}"):
        wake()
    world.replace(1)
    wake()
    assert world.states() == ["ready", "ready"]
    assert world.processes[0].calls == ["sleep", "wake_weights", "wake_cache"]


@pytest.mark.parametrize(
    ("takes_turns", "expected"),
    [(True, [["infer"], ["sleep"], ["train", "ref"]]), (False, [["train", "infer", "ref"]])],
)
def test_engines_that_share_devices_load_alone_and_sleep_before_others_load(
    takes_turns: bool, expected: list[list[str]]
) -> None:
    done: list[list[str]] = []
    group = SimpleNamespace(send=lambda method: [method])
    crew: Any = SimpleNamespace(load=list, groups=dict.fromkeys(("train", "infer", "ref"), group))
    waiter: Any = SimpleNamespace(gather=lambda calls, limit: done.append(calls))
    config: Any = SimpleNamespace(takes_turns=takes_turns, training=SimpleNamespace(start_timeout_s=1.0))
    load(crew, waiter, config)
    assert done == expected
