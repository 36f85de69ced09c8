"""Processes in place of lost ones, without a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.assembly.roles import build_engine
from rlxf.config.kinds import Role
from rlxf.core.errors import StopRequested, WorkerLost
from tests.unit.workers.fakes import AtOnce, Process, member
from workers import crew as module
from workers.crew import Crew
from workers.engine import RolloutWorker
from workers.group import Member, WorkerGroup
from workers.worker import NO_RENDEZVOUS


class Room:
    """What answers a call of ``address``."""

    def address(self) -> tuple[str, int]:
        return "10.0.0.1", 4000


class World:
    """A crew of one role, without its start."""

    def __init__(self, role: Role, size: int = 2) -> None:
        self.left: list[str] = []
        self.killed: list[Any] = []
        self.given: list[tuple[Any, ...]] = []  # what the calls of `build` got
        self.find: Callable[[list[Any]], list[Any]] = lambda slots: slots
        self.crew = crew = object.__new__(Crew)
        everything: Any = self
        crew._config = crew._platform = everything
        crew._watch = crew._pools = everything
        crew._waiter, crew._lock = AtOnce(), threading.RLock()
        slot: Any = SimpleNamespace(node="a")
        crew._slots, crew._starts, crew._lost_at = {role: [slot] * size}, {role: [0] * size}, {}
        self.group = WorkerGroup([member(self.process(), rank) for rank in range(size)], crew._waiter, crew)
        crew.groups = {role: self.group}
        crew._start = lambda role, rank: member(self.process(), rank)  # type: ignore[method-assign]

    def process(self) -> Process:
        process = Process(Room())
        make = process.make

        def noted(method: str, args: tuple[Any, ...]) -> Any:
            if method == "build":
                self.given.append(args)
            return make(method, args)

        process.make = noted  # type: ignore[method-assign]
        return process

    def is_gone(self, name: str) -> bool:
        return name not in self.left and any(found.name == name and found.handle.dead for found in self.group.members)

    def leave(self, name: str) -> None:
        self.left.append(name)

    def living(self, slots: list[Any]) -> list[Any]:
        return self.find(slots)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "kill", lambda handle: None)


def test_members_stay_gone_when_the_wait_for_their_devices_breaks_off() -> None:
    """Both a trainer and an engine of a lost node: the engine's thread gives up, and the run goes on without it."""
    world = World("infer")
    lost: Member = world.group.members[1]
    lost.handle.dead = True

    def stopped(slots: list[Any]) -> list[Any]:
        raise StopRequested("nobody waits any more")

    world.find = stopped
    with pytest.raises(StopRequested):
        world.crew.start_again(world.group, [1], WorkerLost("lost rank 1"))
    assert world.crew.gone(world.group) == [1]
    world.find = lambda slots: slots
    assert len(world.crew.start_again(world.group, [1], WorkerLost("lost rank 1"))) == 1
    assert world.crew.gone(world.group) == []


def test_an_engine_that_is_started_again_does_not_wait_for_the_first_one() -> None:
    world = World("infer")
    world.crew.start_again(world.group, [1], WorkerLost("lost rank 1"))
    ((_, master, again),) = world.given
    assert (master, again) == (NO_RENDEZVOUS, True)
    assert world.group.members[0].handle.calls == []


def test_ranks_of_a_group_meet_at_the_first_one() -> None:
    world = World("ref")
    world.crew.start_again(world.group, [0, 1], WorkerLost("lost rank 1"))
    assert {master.answer for _, master, _ in world.given} == {("10.0.0.1", 4000)}


@pytest.mark.parametrize("again", [False, True])
def test_an_engine_in_place_of_another_does_not_sample_before_it_got_weights(
    monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    anything: Any = SimpleNamespace(name="cpu", actor_rollout=SimpleNamespace(load=None))
    worker = RolloutWorker(0, 1)
    monkeypatch.setattr(RolloutWorker, "make", staticmethod(lambda *given: ("fresh", given)))
    monkeypatch.setattr(worker, "place", lambda config, master: (anything, anything))
    assert isinstance(RolloutWorker.make_again, partial)
    assert (RolloutWorker.make_again.func, RolloutWorker.make_again.keywords) == (build_engine, {"stale": True})
    monkeypatch.setattr(RolloutWorker, "make_again", staticmethod(lambda *given: ("stale", given)))
    worker.build(anything, ("", 0), again)
    assert worker.room[0] == ("stale" if again else "fresh")
