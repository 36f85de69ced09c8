"""Signs of life without a cluster: a dict in place of the head node's store, and a clock that is set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest

from rlxf.core.memory import Memory
from rlxf.core.progress import Progress, Seen
from workers import signs
from workers.signs import LOST_S, Process, Sign, SignsOfLife, driver_key, driver_sign, started


class World:
    """The store, the time, and what became of the worker's process."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}
        self.now = 1000.0
        self.left: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def put(self, key: str, value: bytes) -> None:
        self.store[key] = value


class NoThread:
    def __init__(self, **_: object) -> None: ...

    def start(self) -> None: ...


DRIVER = Process(pid=1, started=1, machine="another machine")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(signs, "put", found.put)
    monkeypatch.setattr(signs, "get", found.store.get)
    monkeypatch.setattr(signs, "time", found)
    monkeypatch.setattr(signs.threading, "Thread", NoThread)
    return found


@pytest.fixture
def worker(world: World) -> SignsOfLife:
    world.store[driver_key("run")] = driver_sign(1, DRIVER)
    found = SignsOfLife("run", "ref-0-0", progress=Progress(), leave=world.left.append)
    found._give_one(1)
    return found


def pass_time(world: World, worker: SignsOfLife, seconds: float, each: Callable[[], None] = lambda: None) -> None:
    """As many seconds in which the worker's threads do their work."""
    for _ in range(round(seconds)):
        world.now += 1.0
        each()
        worker._give_one(2)
        worker._end_if_lost()


def test_a_sign_comes_back_as_it_was_given() -> None:
    seen = Seen(7, "update", {"update": 1.5})
    memory = Memory(limit=7, available=4)
    sign = Sign(number=3, process=Process.this(), rss=5, device_bytes=6, oom_kills=2, seen=seen, memory=memory)
    assert Sign.from_bytes(sign.to_bytes()) == sign


def test_a_process_is_found_by_number_start_and_machine() -> None:
    this = Process.this()
    found = this.found()
    assert found is not None
    assert found.pid == os.getpid()
    assert replace(this, started=this.started - 1).found() is None  # its number was given to a later process
    assert replace(this, machine="another").found() is None
    assert replace(this, pid=2**22 - 1).found() is None


def test_a_process_is_found_after_the_machines_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    this = Process.this()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 5.0)  # what seconds since 1970 are counted from
    assert this.found() is not None
    assert Process.this() == this


def test_a_process_that_has_ended_is_not_found_before_its_parent_has_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = replace(Process.this(), pid=child.pid, started=started(child.pid))
    assert process.found() is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert process.found() is None
    child.communicate()
    assert process.found() is None


def test_a_worker_tells_what_it_is_doing(world: World, worker: SignsOfLife) -> None:
    sign = Sign.from_bytes(world.store["run/ref-0-0"])
    assert (sign.number, sign.process, sign.seen) == (1, Process.this(), Seen(0, ""))
    assert sign.rss > 1_000_000


def test_a_worker_ends_when_its_driver_is_silent(world: World, worker: SignsOfLife) -> None:
    pass_time(world, worker, LOST_S)
    assert world.left == []
    pass_time(world, worker, 1)
    assert world.left == [1]


def test_a_worker_stays_as_long_as_its_driver_gives_signs(world: World, worker: SignsOfLife) -> None:
    number = iter(range(2, 1000))

    def beat() -> None:
        world.store[driver_key("run")] = driver_sign(next(number), DRIVER)

    pass_time(world, worker, 10 * LOST_S, beat)
    assert world.left == []


def test_a_driver_of_this_machine_that_is_stopped_is_not_lost(world: World) -> None:
    world.store[driver_key("run")] = driver_sign(1, Process.this())
    worker = SignsOfLife("run", "ref-0-0", progress=Progress(), leave=world.left.append)
    worker._give_one(1)
    pass_time(world, worker, 4 * LOST_S)
    assert world.left == []
    worker.require_driver()
    world.store[driver_key("run")] = driver_sign(2, replace(Process.this(), started=1))  # one that has ended
    pass_time(world, worker, LOST_S + 2)
    assert world.left == [1]


def test_what_a_worker_slept_through_is_no_silence(world: World, worker: SignsOfLife) -> None:
    pass_time(world, worker, LOST_S - 2)
    world.now += 3600.0  # it was stopped; two seconds of that are as long as a look may be late
    worker._end_if_lost()
    assert world.left == []
    pass_time(world, worker, 1)
    assert world.left == [1]


def test_nothing_is_written_without_a_driver(world: World, worker: SignsOfLife) -> None:
    pass_time(world, worker, LOST_S / 2)
    worker.require_driver()
    pass_time(world, worker, 1)
    with pytest.raises(RuntimeError, match=r"nothing was heard of the driver for 1[34] s, so nothing is written"):
        worker.require_driver()


def test_a_head_node_that_does_not_answer_counts_as_silence(
    world: World, worker: SignsOfLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise ConnectionError("the head node is gone")

    monkeypatch.setattr(signs, "get", nothing)
    for _ in range(round(LOST_S) + 1):
        world.now += 1.0
        with pytest.raises(ConnectionError):
            worker._give_one(2)
        worker._end_if_lost()
    assert world.left == [1]


def test_after_the_end_of_the_run_nothing_is_put(world: World, worker: SignsOfLife) -> None:
    """The driver deletes everything and then ends the workers: their last signs would stay for ever."""
    world.store.clear()
    worker._give_one(2)
    assert world.store == {}


def test_a_worker_in_whose_place_there_is_another_ends_itself(world: World, worker: SignsOfLife) -> None:
    world.store[driver_key("run")] = driver_sign(2, DRIVER, ["run/ref-1-0"])
    worker._give_one(2)
    assert world.left == []
    world.store[driver_key("run")] = driver_sign(3, DRIVER, ["run/ref-1-0", "run/ref-0-0"])
    worker._give_one(3)
    assert world.left == [1]
