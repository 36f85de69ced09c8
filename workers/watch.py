"""The driver's look at its workers: who moves, who hangs, who is gone; and the end of a worker that hangs.

A worker hangs when it has work and gives no sign of life for ``resilience.min_deadline_s`` (it is stopped), or when
its counter stands still for longer than its phase may take. A phase may take ten times its median so far, at least
``min_deadline_s``, at most ``training.stage_timeout_s``. Its first time in a process, in which devices compile and
ranks connect, is a phase of its own; as long as no process of the role has ended it, it may take
``training.start_timeout_s``. So no rank waits for long in a group whose ranks do not find each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

import psutil
from ray._private.state import actors

from rlxf.core.events import event
from rlxf.core.memory import machine_memory
from rlxf.core.progress import FIRST
from rlxf.core.waiting import in_thread
from rlxf.observe.memory import DRIVER, ProcessMemory

from .ending import Ending
from .memory import MemoryAtEnd
from .signs import BEAT_S, Process, Sign, driver_key, driver_sign, forget, get, new_run, oom_kills, put

log = logging.getLogger(__name__)

TIMES_MEDIAN = 10.0  # how much longer than usual a phase may take
QUIET_S = 1.5  # without a sign: look whether Ray has noticed a death
LOADING_S = 300.0  # shortest silence that counts while a worker loads: that can hold all of its threads up
_LOADING = ("build", "first build")
# They write or read a whole model without a step in between, on a disk of unknown speed.
_OF_FILES = ("save", "load", "save_hf", "save_checkpoint", "load_checkpoint", "checkpoint_written")
KILLS_S = 1.2  # how long to wait for the newest count of the processes that another machine's kernel has killed
_ANSWER_S = 10.0  # of Ray's head
_CLOSE_S = 5.0
_REPLACED = 1000  # so many of the newest are told: each of them has ended long before


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a worker may stand still, seconds."""

    min_deadline_s: float
    stage_s: float
    start_s: float


@dataclass(kw_only=True, slots=True)
class Watched:
    """A worker process, and what is known of it."""

    name: str  # "infer rank 1 on node 10.0.0.1 (8c6fb2)"
    role: str
    node: str
    key: str
    handle: Any  # Ray actor handle
    sign: Sign | None = None
    heard_at: float = 0.0  # when its newest sign was seen
    moved_at: float = 0.0  # when its counter was seen to change
    gone: bool = False  # Ray says so
    ended: str | None = None  # why the driver ended it
    rss: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=3))  # when it was heard, bytes


class Watch:
    """Follows the workers of a run in a thread of its own.

    Args:
        limits: see above.
        ending: ends a worker that hangs, on whichever node.
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, limits: Limits, ending: Ending, now: Any = time.monotonic) -> None:
        self.run = new_run()
        self._limits, self._ending, self._now = limits, ending, now
        self._watched: dict[str, Watched] = {}
        self._medians: dict[tuple[str, str], float] = {}  # role and phase: outlives the processes
        self._lock = threading.RLock()
        self._leaves = threading.Event()
        self._replaced: list[str] = []
        self._number, self._process, self._here = 0, Process.this(), psutil.Process()
        self._own = self._own_memory()
        self._looked_at = self._now()  # when the newest look at all workers began
        self._put_driver_sign()
        self._thread = threading.Thread(target=self._follow_all, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is followed any more. Before Ray is shut down."""
        self._leaves.set()
        self._thread.join(_CLOSE_S)
        wait_for([in_thread(lambda: forget(self.run), "forget")], _CLOSE_S)  # the head node may not answer

    def follow(self, name: str, *, role: str, node: str, key: str, handle: Any) -> None:
        """From now on the worker of that name is this process; ``key``: the name by which it signs."""
        with self._lock:
            self._watched[name] = Watched(name=name, role=role, node=node, key=f"{self.run}/{key}", handle=handle)

    def leave(self, name: str) -> None:
        """Another worker takes the place of the one of that name, which ends itself if nobody else ends it."""
        with self._lock:
            worker = self._watched.pop(name, None)
            if worker is not None:
                self._replaced = [*self._replaced[-_REPLACED:], worker.key]

    def signs(self) -> list[tuple[Watched, Sign]]:
        """Every worker that has given a sign, and its newest."""
        with self._lock:
            return [(worker, worker.sign) for worker in self._watched.values() if worker.sign is not None]

    def memory(self) -> list[ProcessMemory]:
        """What the workers use by their newest signs, and the driver."""
        with self._lock:
            workers = [(worker, worker.sign) for worker in self._watched.values() if worker.sign and not worker.gone]
            return [self._own, *(_memory_of(worker, sign) for worker, sign in workers)]

    def memory_at_end(self, name: str) -> MemoryAtEnd | None:
        """What is known of the memory of a worker that has died; None: nothing."""
        noticed = self._now()
        with self._lock:
            worker = self._watched.get(name)
            if worker is None or worker.sign is None:
                return None
            sign, figures = worker.sign, [(noticed - at, rss) for at, rss in worker.rss]
        kills = self._kills_since(sign, until=noticed + KILLS_S)
        return MemoryAtEnd(role=worker.role, figures=tuple(figures), limit=sign.memory.limit, kills=kills)

    def why_ended(self, name: str) -> str | None:
        """Why a worker was ended by the driver; None: it was not."""
        with self._lock:
            worker = self._watched.get(name)
            return worker.ended if worker else None

    def mark_gone(self, name: str) -> None:
        """A call said that the worker is lost, which Ray may not have noted yet."""
        with self._lock:
            if name in self._watched:
                self._watched[name].gone = True

    def is_gone(self, name: str) -> bool:
        """Whether the worker's process has ended."""
        with self._lock:
            worker = self._watched.get(name)
        return worker is not None and (worker.gone or _is_dead(worker.handle))

    def end_hung(self, names: Collection[str], place: str) -> None:
        """End each of these workers, all of which have work, that hangs; ``place``: where the run is, for people.

        What counts is the newest look: what this process slept through since then is nobody's silence.
        """
        now = self._looked_at
        with self._lock:
            found = [(worker, self._why_hung(worker, now)) for name in names if (worker := self._watched.get(name))]
        hung = [(worker, why) for worker, why in found if why is not None]
        silent = [(worker, why) for worker, why in hung if self._is_silent(worker, now)]
        for worker, why in silent or hung:  # ranks that wait for a stopped one do not move either
            self._end(worker, why, place)

    def end_overdue(self, names: Collection[str], place: str) -> bool:
        """End those of these workers that are at work, or silent, after the time of any stage; whether there is one."""
        limit = f"no answer within training.stage_timeout_s = {self._limits.stage_s:g} s"
        with self._lock:
            busy = [self._watched[name] for name in names if self._is_busy(name)]
        for worker in busy:
            self._end(worker, limit, place)
        return bool(busy)

    def _end(self, worker: Watched, why: str, place: str) -> None:
        """End a worker that hangs: note where its threads are, then kill it."""
        name = worker.name
        with self._lock:
            # Another thread may end it, or have started a process of the same name in its place: that took a while.
            if self._watched.get(name) is not worker or worker.ended is not None:
                return
            worker.ended = why
            phase = worker.sign.seen.phase if worker.sign else ""
        log.warning("%s: %s hangs: %s; it is ended", place, name, why, extra=event("hung", who=name, phase=phase))
        stacks = self._ending.end(worker.handle, worker.sign.process if worker.sign else None, worker.node, name)
        with self._lock:
            worker.ended = f"{why}; {stacks}"

    def _why_hung(self, worker: Watched, now: float) -> str | None:
        if worker.sign is None or worker.gone or worker.ended is not None:
            return None
        if self._is_silent(worker, now):
            return f"its process gave no sign of life for {now - worker.heard_at:.0f} s"
        phase, still = worker.sign.seen.phase, now - worker.moved_at
        limit, origin = self._deadline(worker.role, phase)
        if phase and still > limit:
            return f"no progress for {still:.0f} s in {phase}, whose limit is {limit:.0f} s ({origin})"
        return None

    def _is_silent(self, worker: Watched, now: float) -> bool:
        assert worker.sign is not None
        least = self._limits.min_deadline_s
        limit = max(least, LOADING_S) if worker.sign.seen.phase in _LOADING else least
        return now - worker.heard_at > limit

    def _is_busy(self, name: str) -> bool:
        worker = self._watched.get(name)
        if worker is None or worker.sign is None:
            return False
        return bool(worker.sign.seen.phase) or self._now() - worker.heard_at > 2 * QUIET_S

    def _deadline(self, role: str, phase: str) -> tuple[float, str]:
        """How long a phase may take without progress, seconds; the key or rule that says so."""
        least, start, most = self._limits.min_deadline_s, self._limits.start_s, self._limits.stage_s
        if phase in _LOADING:
            return start, "training.start_timeout_s"
        median = self._medians.get((role, phase))
        if median is None and phase.removeprefix(FIRST).partition(" (")[0] not in _OF_FILES:
            median = self._medians.get((role, f"{FIRST}{phase}"))
            if median is None and max(start, least) < most:
                return max((start, "training.start_timeout_s"), (least, "resilience.min_deadline_s"))
        if median is None or TIMES_MEDIAN * median > most or least > most:
            return most, "training.stage_timeout_s"
        return max((TIMES_MEDIAN * median, "ten times as long as usual"), (least, "resilience.min_deadline_s"))

    def _follow_all(self) -> None:
        while not self._leaves.wait(BEAT_S):
            try:
                self._look_at_all()
            except Exception as error:  # noqa: BLE001  the head node does not answer; whoever waits for workers tells it
                log.debug("the workers' signs of life could not be read: %s", error)

    def _look_at_all(self) -> None:
        """One look; the time since the one before counts only as far as this process could look."""
        now = self._now()
        self._put_driver_sign()
        self._own = self._own_memory()
        with self._lock:
            workers = list(self._watched.values())
        found = [(worker, get(worker.key)) for worker in workers]
        self._forgive(now - self._looked_at - 2 * BEAT_S)
        for worker, text in found:
            self._look_at(worker, None if text is None else Sign.from_bytes(text))
        self._looked_at = now

    def _kills_since(self, sign: Sign, until: float) -> int:
        """How many processes the kernel has killed on the sign's machine since; 0 also if nobody there can tell.

        On another machine than the driver's the next signs of other workers tell: up to ``until`` they are waited for.
        """
        machine, before = sign.process.machine, sign.oom_kills
        if machine == self._process.machine:
            return max(oom_kills() - before, 0)
        while True:
            there = [other.oom_kills for _, other in self.signs() if other.process.machine == machine]
            newest = max(there, default=before)
            if newest > before or self._now() > until:
                return max(newest - before, 0)
            time.sleep(BEAT_S / 5)

    def _own_memory(self) -> ProcessMemory:
        process = self._process
        return ProcessMemory(
            role=DRIVER, node="of the driver", machine=process.machine, identity=f"{DRIVER} {process.pid}",
            rss=self._here.memory_info().rss, memory=machine_memory(),
        )  # fmt: skip

    def _put_driver_sign(self) -> None:
        self._number += 1
        put(driver_key(self.run), driver_sign(self._number, self._process, self._replaced))

    def _forgive(self, late: float) -> None:
        """What this process slept through (Ctrl-Z, a machine without a free core, a head node that does not answer) is
        nobody's silence.
        """
        if late > 0:
            with self._lock:
                for worker in self._watched.values():
                    worker.heard_at += late
                    worker.moved_at += late

    def _look_at(self, worker: Watched, sign: Sign | None) -> None:
        now = self._now()
        with self._lock:
            before = worker.sign
            if sign is not None and (before is None or sign.number != before.number):
                if before is None or sign.seen.counter != before.seen.counter:
                    worker.moved_at = now
                worker.sign, worker.heard_at = sign, now
                worker.rss.append((now, sign.rss))
                self._medians |= {(worker.role, phase): median for phase, median in sign.seen.medians.items()}
            quiet = worker.sign is None or now - worker.heard_at > QUIET_S
        if quiet and not worker.gone and worker.ended is None and _is_dead(worker.handle):
            worker.gone = True
            log.warning("%s has ended while nobody waited for it", worker.name, extra=event("gone", who=worker.name))


def _memory_of(worker: Watched, sign: Sign) -> ProcessMemory:
    return ProcessMemory(
        role=worker.role, node=worker.node, machine=sign.process.machine, identity=worker.key, rss=sign.rss,
        memory=sign.memory, device_bytes=sign.device_bytes, device_total=sign.device_total,
    )  # fmt: skip


def _is_dead(handle: Any) -> bool:
    """Whether Ray knows that an actor's process has ended; a head that does not answer knows of none."""
    asked = in_thread(lambda: actors(handle._actor_id.hex()).get("State"), "state of an actor")
    try:
        return bool(asked.result(_ANSWER_S) == "DEAD")
    except TimeoutError:
        return False
