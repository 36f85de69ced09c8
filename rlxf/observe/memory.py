"""Memory of a run's processes: figures for the row of each step, and an early warning when memory will run out.

A curve of memory against steps counts as growing only if each of its halves grows, and the second not much slower than
the first: what allocators and caches take at first, and what a single event takes once, is no leak.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil

from rlxf.core.events import event
from rlxf.core.memory import GIB, MIB, Memory, machine_memory
from rlxf.core.types import Metrics

log = logging.getLogger(__name__)

DRIVER = "driver"
WARM_UP = 5  # first rows of a set of processes, which say nothing
LEAST, MOST = 20, 120  # points of a curve: fewer are not looked at, more are thinned out
RECENT = 60  # newest points that are looked at by themselves: growth may begin late
SHARE = 0.05  # of the limit: smaller growth over all points is not told
SURE = 3.0  # standard deviations: of 1,000 halves that are noise, one grows by chance
SLOWER = 0.5  # a second half that grows at less than this pace of the first: the growth is about to end


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMemory:
    """What one process of the run uses."""

    role: str  # of a worker, or ``DRIVER``
    node: str  # for people
    machine: str  # the same for processes that share its memory
    identity: str  # of the process
    rss: int  # bytes that are resident
    memory: Memory  # of its machine
    device_bytes: int = 0  # 0: none
    device_total: int = 0  # memory of its device, bytes; 0: unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Slope:
    """Theil-Sen: the median of the slopes between all pairs of points."""

    value: float  # per step
    least: float  # lower bound of its confidence interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Memory that will run out within the run."""

    per_step: float  # bytes
    full_at: int  # driver step


@dataclass(frozen=True, slots=True)
class Point:
    """Memory after a step, bytes: of each part, and of all."""

    step: int
    total: float
    parts: Mapping[str, float]


def theil_sen(steps: Sequence[float], values: Sequence[float], sure: float = SURE) -> Slope:
    """The slope of ``values`` against ``steps``, which increase; its lower bound lies ``sure`` deviations below.

    The bound is Sen's (1968), from the variance of Kendall's statistic. It takes points to be independent.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    later, earlier = np.tril_indices(len(x), -1)
    slopes = np.sort((y[later] - y[earlier]) / (x[later] - x[earlier]))
    count, points = len(slopes), len(x)
    width = sure * math.sqrt(points * (points - 1) * (2 * points + 5) / 18)
    rank = int((count - width) / 2)
    return Slope(value=float(np.median(slopes)), least=float(slopes[rank]) if count > width else -math.inf)


def growth(points: Sequence[Point], *, limit: float, room: float, last_step: int) -> Growth | None:
    """Memory that grows, significantly, and reaches the limit by ``last_step``; None: it does not.

    Args:
        points: in the order of the steps.
        limit: all memory, bytes.
        room: bytes that are left after the last point.
        last_step: of the run.
    """
    if len(points) < LEAST or _rise([point.total for point in points]) <= SHARE * limit:
        return None
    half = len(points) // 2
    first, second = _slope(points[:half]), _slope(points[half:])
    pace = min(first.value, second.value)
    if min(first.least, second.least) <= 0 or second.value < SLOWER * first.value:
        return None
    full_at = points[-1].step + math.ceil(room / pace)
    return Growth(per_step=pace, full_at=full_at) if full_at <= last_step else None


def fastest(points: Sequence[Point]) -> tuple[str, float]:
    """The part of the memory that grows most, and its bytes a step."""
    steps = [point.step for point in points]
    names = points[-1].parts
    slopes = {name: theil_sen(steps, [point.parts.get(name, 0.0) for point in points]).value for name in names}
    return max(slopes.items(), key=lambda item: item[1])


def _slope(points: Sequence[Point]) -> Slope:
    return theil_sen([point.step for point in points], [point.total for point in points])


def _rise(values: Sequence[float]) -> float:
    """From the first fifth to the last; never more than the largest difference of two values."""
    fifth = max(len(values) // 5, 1)
    return median(values[-fifth:]) - median(values[:fifth])


class Curve:
    """Memory of these processes against steps, in few points: those of all steps, thinned out, and the newest."""

    def __init__(self, processes: frozenset[str]) -> None:
        self._processes = processes
        self._step, self._rows, self._every = -1, 0, 1  # the last step; rows so far; which of them are kept
        self._whole: list[Point] = []
        self._recent: deque[Point] = deque(maxlen=RECENT)

    def goes_on(self, step: int, processes: frozenset[str]) -> bool:
        """Whether this step follows: the processes are the same, and no steps are done again."""
        return processes == self._processes and step > self._step

    def add(self, step: int, parts: Mapping[str, float]) -> None:
        """Memory after a step, bytes of each part."""
        self._step, self._rows = step, self._rows + 1
        if self._rows <= WARM_UP:
            return
        self._last = Point(step, sum(parts.values()), dict(parts))
        self._recent.append(self._last)
        if self._rows % self._every == 0:
            self._whole.append(self._last)
        if len(self._whole) > MOST:
            self._whole, self._every = self._whole[1::2], 2 * self._every

    def windows(self) -> Iterable[Sequence[Point]]:
        """The points to look at."""
        if self._recent:
            whole = self._whole if self._whole and self._whole[-1] is self._last else [*self._whole, self._last]
            yield whole
            yield list(self._recent)

    def growth(self, *, limit: float, room: float, last_step: int) -> tuple[Growth, Sequence[Point]] | None:
        """As the function, of one of the windows."""
        for points in self.windows():
            found = growth(points, limit=limit, room=room, last_step=last_step)
            if found is not None:
                return found, points
        return None


class MemoryReport:
    """``memory/*`` of each step; warns, once for each machine and each role's devices, of memory that will run out.

    Args:
        look: what the run's processes use now. It must be fast: the driver waits for it in every step.
        last_step: of the run.
    """

    def __init__(self, look: Callable[[], Sequence[ProcessMemory]], last_step: int) -> None:
        self._look, self._last_step = look, last_step
        self._curves: dict[str, Curve] = {}
        self._told: set[str] = set()

    def __call__(self, step: int) -> Metrics:
        """The metrics after ``step`` complete steps."""
        found = self._look()
        machines = _by(found, lambda process: process.machine)
        for machine, processes in machines.items():
            self._look_at_machine(machine, processes, step)
        for role, processes in _by(found, lambda process: process.role).items():
            self._look_at_devices(role, [process for process in processes if process.device_total], step)
        return _metrics(found, machines.values())

    def _look_at_machine(self, machine: str, processes: Sequence[ProcessMemory], step: int) -> None:
        parts = {role: float(_sum(some)) for role, some in _by(processes, lambda process: process.role).items()}
        memory = min((process.memory for process in processes), key=lambda memory: memory.available)
        found = self._growth(machine, parts, processes, step, limit=memory.limit, room=memory.available)
        if found is not None:
            node = next((process.node for process in processes if process.role != DRIVER), processes[0].node)
            consequence = "the kernel then kills one of its processes"
            self._tell(found, step, f"the memory of node {node}", memory.limit, memory.available, consequence)

    def _look_at_devices(self, role: str, processes: Sequence[ProcessMemory], step: int) -> None:
        if not processes:
            return
        fullest = max(processes, key=lambda process: process.device_bytes)
        room = fullest.device_total - fullest.device_bytes
        parts = {role: float(fullest.device_bytes)}
        found = self._growth(f"devices of {role}", parts, processes, step, limit=fullest.device_total, room=room)
        if found is not None:
            consequence = "an allocation then fails"
            self._tell(found, step, f"the device memory of {role}", fullest.device_total, room, consequence)

    def _growth(
        self,
        key: str,
        parts: Mapping[str, float],
        processes: Sequence[ProcessMemory],
        step: int,
        *,
        limit: float,
        room: float,
    ) -> tuple[Growth, Sequence[Point]] | None:
        if key in self._told:
            return None
        identities = frozenset(process.identity for process in processes)
        curve = self._curves.get(key)
        if curve is None or not curve.goes_on(step, identities):
            curve = self._curves[key] = Curve(identities)
        curve.add(step, parts)
        found = curve.growth(limit=limit, room=room, last_step=self._last_step)
        if found is not None:
            self._told.add(key)
            self._curves.pop(key)
        return found

    def _tell(
        self, found: tuple[Growth, Sequence[Point]], step: int, what: str, limit: float, room: float, consequence: str
    ) -> None:
        grows, points = found
        role, pace = fastest(points)
        log.warning(
            "%s grows by %s a step, that of %s by %s: %s of %s are left, and at this pace none at step %d of %d; "
            "%s. training.save_interval limits the steps that this costs",
            what, as_text(grows.per_step), role, as_text(pace), as_text(room), as_text(limit), grows.full_at,
            self._last_step, consequence, extra=event("memory", who=role, step=step),
        )  # fmt: skip


def driver_memory() -> list[ProcessMemory]:
    """Of a run in this process alone."""
    rss, pid = psutil.Process().memory_info().rss, str(os.getpid())
    return [ProcessMemory(role=DRIVER, node="this machine", machine="", identity=pid, rss=rss, memory=machine_memory())]


def as_text(size: float) -> str:
    """``1.20 GiB``, ``12.3 MiB``."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.3g} MiB"


def _metrics(found: Sequence[ProcessMemory], machines: Iterable[Sequence[ProcessMemory]]) -> Metrics:
    metrics = Metrics()
    for role, processes in _by(found, lambda process: process.role).items():
        metrics[f"memory/{role}_rss_gib"] = max(process.rss for process in processes) / GIB
        if device := max(process.device_bytes for process in processes):
            metrics[f"memory/{role}_device_gib"] = device / GIB
    if any(process.role != DRIVER for process in found):
        metrics["memory/node_rss_gib"] = max(map(_sum, machines)) / GIB
    return metrics


def _sum(processes: Sequence[ProcessMemory]) -> int:
    return sum(process.rss for process in processes)


def _by(found: Sequence[ProcessMemory], key: Callable[[ProcessMemory], str]) -> dict[str, list[ProcessMemory]]:
    groups: dict[str, list[ProcessMemory]] = {}
    for process in found:
        groups.setdefault(key(process), []).append(process)
    return groups
