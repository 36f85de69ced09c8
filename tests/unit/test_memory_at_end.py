"""What a lost worker's message says of its memory: that the kernel killed it for want of memory, or its last figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from rlxf.core.clock import Clock
from rlxf.core.errors import WorkerLost
from rlxf.core.memory import GIB, MIB, Memory, machine_memory
from rlxf.core.stop import Stop
from workers import remote, watch
from workers.ending import Ending
from workers.memory import MemoryAtEnd
from workers.remote import Pending, Waiter
from workers.signs import Process, Sign, oom_kills
from workers.watch import Limits, Watch

WORKER = "infer rank 0 on node 10.0.0.2 (8c6fb2)"
AT_END = MemoryAtEnd(
    role="infer", figures=((1.3, GIB), (0.8, 2 * GIB), (0.3, 3 * GIB)), limit=4 * GIB, kills=0
)  # fmt: skip


class Followed:
    """A watch that knows one death."""

    def __init__(self, at_end: MemoryAtEnd | None, ended: str | None = None) -> None:
        self._at_end, self._ended = at_end, ended

    def end_hung(self, names: Collection[str], place: str) -> None: ...

    def end_overdue(self, names: Collection[str], place: str) -> bool:
        return False

    def mark_gone(self, name: str) -> None:
        assert name == WORKER

    def why_ended(self, name: str) -> str | None:
        return self._ended

    def memory_at_end(self, name: str) -> MemoryAtEnd | None:
        assert name == WORKER
        return self._at_end


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of a worker that is lost with that error."""

    def message(followed: Followed, error: Exception | None = None) -> str:
        def fail(*_: Any, **__: Any) -> None:
            raise error or ActorDiedError()

        monkeypatch.setattr(remote.ray, "wait", lambda refs, **_: (refs, []))
        monkeypatch.setattr(remote.ray, "get", fail)
        with pytest.raises(WorkerLost) as caught:
            Waiter(Clock(), Stop(), 60.0, "the logs", followed).gather([Pending("x", WORKER, "generate")])
        return str(caught.value)

    return message


def test_a_worker_that_the_kernel_killed_is_named_as_such(lost: Callable[..., str]) -> None:
    text = lost(Followed(replace(AT_END, kills=1)))
    assert (
        f"lost {WORKER} during generate: killed for want of memory (OOM): the memory of infer was 1.00 GiB 1.3 s "
        "before, 2.00 GiB 0.8 s before, 3.00 GiB 0.3 s before; the limit of its node is 4.00 GiB. The actor died"
    ) in text


@pytest.mark.parametrize("at_end", [AT_END, None], ids=["signs", "no signs"])
def test_a_worker_that_ray_killed_for_want_of_memory_is_lost(
    lost: Callable[..., str], at_end: MemoryAtEnd | None
) -> None:
    text = lost(Followed(at_end), OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert f"lost {WORKER} during generate: killed for want of memory (OOM)" in text
    assert "running low on memory" in text
    assert ("3.00 GiB 0.3 s before" in text) == (at_end is not None)


def test_any_other_death_tells_the_last_figure(lost: Callable[..., str]) -> None:
    text = lost(Followed(AT_END))
    assert "Its memory was 3.00 GiB at the last sign of life, 0.3 s before. Logs: the logs" in text
    assert "OOM" not in text.replace("OOM killer", "")


def test_a_death_of_which_nothing_is_known_is_told_as_ray_does(lost: Callable[..., str]) -> None:
    assert "memory" not in lost(Followed(None))


def test_a_worker_that_the_driver_ended_has_its_reason(lost: Callable[..., str]) -> None:
    text = lost(Followed(replace(AT_END, kills=1), ended="silence"))
    assert "it was ended, because of silence." in text
    assert "memory" not in text


class World:
    """A watch with the signs of two workers, which the test gives, in place of Ray's key-value store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.signs: dict[str, bytes] = {}
        self.kills = 5  # on the driver's machine
        monkeypatch.setattr(watch, "BEAT_S", 0.01)
        for name, fake in {
            "new_run": lambda: "run", "put": lambda *_: None, "get": self.signs.get, "forget": lambda run: None,
            "_is_dead": lambda handle: False, "oom_kills": lambda: self.kills,
        }.items():  # fmt: skip
            monkeypatch.setattr(watch, name, fake)
        limits = Limits(min_deadline_s=60.0, stage_s=60.0, start_s=60.0)
        self.watch = Watch(limits, Ending(folder, dict))

    def gives(self, role: str, machine: str, number: int, rss: int, kills: int) -> None:
        """A sign, which the watch has seen when this returns."""
        name = f"{role} rank 0"
        if number == 1:
            self.watch.follow(name, role=role, node=f"node {machine}", key=role, handle=None)
        process = Process(pid=1, started=0.0, machine=machine)
        full = Memory(limit=4 * GIB, available=GIB)
        sign = Sign(number=number, process=process, rss=rss, memory=full, oom_kills=kills)
        self.signs[f"run/{role}"] = sign.to_bytes()
        deadline = time.monotonic() + 10
        while not any(seen == sign for _, seen in self.watch.signs()):
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    made = World(monkeypatch, tmp_path)
    yield made
    made.watch.close()


def at_end(world: World, role: str = "infer") -> MemoryAtEnd:
    found = world.watch.memory_at_end(f"{role} rank 0")
    assert found is not None
    return found


def test_the_last_three_figures_are_known(world: World) -> None:
    here = Process.this().machine
    for number in (1, 2, 3, 4):
        world.gives("infer", here, number, rss=number * GIB, kills=5)
    found = at_end(world)
    assert [rss for _, rss in found.figures] == [2 * GIB, 3 * GIB, 4 * GIB]
    seconds = [since for since, _ in found.figures]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 <= seconds[-1] < 5
    assert (found.role, found.limit, found.kills) == ("infer", 4 * GIB, 0)


def test_a_kill_on_the_drivers_machine_is_counted(world: World) -> None:
    world.gives("infer", Process.this().machine, 1, rss=GIB, kills=5)
    assert at_end(world).kills == 0
    world.kills = 6
    assert at_end(world).kills == 1


def test_on_another_machine_the_next_sign_of_a_worker_there_tells(world: World) -> None:
    world.kills = 100  # the driver's own machine says nothing about it
    world.gives("infer", "b", 1, rss=GIB, kills=5)
    world.gives("train", "b", 1, rss=GIB, kills=5)
    later = threading.Timer(0.1, world.gives, ("train", "b", 2, GIB, 6))
    later.start()
    assert at_end(world).kills == 1
    later.join()


def test_the_only_worker_of_a_machine_takes_the_count_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "KILLS_S", 0.05)
    world.kills = 100
    world.gives("infer", "b", 1, rss=GIB, kills=5)
    assert at_end(world).kills == 0


def test_a_worker_without_a_sign_has_no_memory(world: World) -> None:
    world.watch.follow("ref rank 0", role="ref", node="a", key="ref", handle=None)
    assert world.watch.memory_at_end("ref rank 0") is None
    assert world.watch.memory_at_end("nobody") is None


def test_the_watch_tells_what_workers_and_driver_use(world: World) -> None:
    world.gives("infer", "b", 1, rss=3 * GIB, kills=0)
    world.gives("train", "b", 1, rss=GIB, kills=0)
    found = {process.role: process for process in world.watch.memory()}
    assert set(found) == {"driver", "infer", "train"}
    assert abs(found["driver"].rss - psutil.Process().memory_info().rss) < 256 * MIB
    assert found["driver"].machine == Process.this().machine
    assert (found["infer"].rss, found["infer"].machine, found["infer"].node) == (3 * GIB, "b", "node b")
    assert found["infer"].memory == Memory(limit=4 * GIB, available=GIB)


EATER = """
import sys, time
from rlxf.core.memory import machine_memory
print(machine_memory().limit, flush=True)
sys.stdin.readline()
eaten = []
while True:
    eaten.append(b"x" * 2**20)
    time.sleep(0.001)
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group whose processes may use 128 MiB."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    mount, limit = (v1, "memory.limit_in_bytes") if v1.exists() else (v2, "memory.max")
    group = mount / f"rlxf_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here, which needs root: {error}")
    try:
        try:
            (group / limit).write_text(str(128 * MIB))
        except OSError as error:
            pytest.skip(f"{mount} does not limit memory: {error}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow  # the machine's count of kills is part of other tests' messages
def test_a_kill_by_the_kernel_is_seen(world: World, small_group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "oom_kills", oom_kills)
    process = subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        (small_group / "cgroup.procs").write_text(str(process.pid))
        assert process.stdin is not None
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 128 * MIB  # what the process itself takes for its machine's limit
        world.gives(
            "infer", Process.this().machine, 1, rss=psutil.Process(process.pid).memory_info().rss, kills=oom_kills()
        )
        assert at_end(world).kills == 0
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(timeout=30) == -9
    finally:
        process.kill()
        process.wait()
    found = at_end(world)
    assert found.kills >= 1
    assert re.match(
        r"killed for want of memory \(OOM\): the memory of infer was [\d.]+ MiB [\d.]+ s before; ", found.sentence()
    )
    assert machine_memory().limit > 128 * MIB
