"""Where the run is, how long each stage of a step took, and who had nothing to do meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rlxf.core.types import Metrics

# Who is at work in a stage; in an evaluation everybody is. Without a reference of its own, the actor is the reference.
_AT_WORK: dict[str, tuple[str, ...]] = {
    "gen": ("infer",),
    "adv": ("reward",),
    "ref": ("ref",),
    "update_actor": ("train",),
    "sync": ("train", "infer"),
    "save": ("train",),
}


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work, for people who look at it.

    ``Span("gen", 3, 1, 12.5, 14.0)`` is the sampling of the third step by policy version 1, and took 1.5 seconds.
    """

    stage: str
    step: int  # counts from 1; 0: before the first one
    version: int | None  # policy version that it works with; None: nobody said
    begin: float  # seconds of ``time.perf_counter``
    end: float


class Observer(Protocol):
    """Is told of each piece of work when it has ended, by the thread that did it or waited for it."""

    def stage(self, span: Span, roles: Sequence[str]) -> None:
        """A stage of the driver, and the run's roles that were at work in it."""
        ...

    def call(self, worker: str, span: Span) -> None:
        """A call that a worker process has answered; its name is one for people: "infer rank 1 on node 10.0.0.1"."""
        ...


class Unobserved:
    """Nobody looks."""

    def stage(self, span: Span, roles: Sequence[str]) -> None: ...

    def call(self, worker: str, span: Span) -> None: ...


class _Place(NamedTuple):
    stage: str
    step: int | None  # None: the run's
    version: int | None


_START = _Place("start", None, None)


class Clock:
    """Seconds per stage of the current step; also knows where the run is, for messages of code that waits.

    Args:
        roles: those that the run has, of "train", "infer", "ref" and "reward": their idle time is measured.
        observer: sees every stage, and every call of a worker.
        now: seconds, as ``time.perf_counter`` has them.
    """

    def __init__(
        self,
        roles: Sequence[str] = (),
        observer: Observer | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.step = 0  # driver steps that are complete
        self.seconds: dict[str, float] = {"save": 0.0}
        self._now = now
        self._roles = tuple(roles)
        self._observer: Observer = observer or Unobserved()
        self._pools = _Pools(now)
        self._started = now()
        self._row: _Row | None = None  # when the row before was written; None: before the first step
        self._waited = 0.0  # seconds of the trainer since then
        self._here = threading.local()  # stage and step of a thread that works on another one

    @property
    def place(self) -> str:
        """Where the run is, for people; in a thread of its own what that works on."""
        stage, step, _ = self._place_here
        return f"stage {stage}, step {step + 1}" if step or stage != "start" else "start-up"

    @property
    def stage_here(self) -> str:
        """What this thread works on."""
        return self._place_here[0]

    @property
    def step_here(self) -> int:
        """The step that this thread works on; 0 is the first."""
        return self._place_here[1]

    @property
    def _place_here(self) -> tuple[str, int, int | None]:
        place: _Place = getattr(self._here, "place", _START)
        return place.stage, self.step if place.step is None else place.step, place.version

    def start(self, step: int) -> None:
        """Begin the step that follows ``step`` complete ones; what was counted since the last row is of its row."""
        self.step = step
        self._here.place = _Place(self._place_here[0], None, None)
        self._started = self._now()
        if self._row is None:
            self._row = self._pools.row()

    def begin_again(self) -> None:
        """The steps that are not complete are begun anew: what was counted of them is dropped."""
        self.seconds = {"save": 0.0}
        self._row, self._waited = None, 0.0

    @contextmanager
    def __call__(
        self,
        stage: str,
        *,
        step: int | None = None,
        version: int | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Iterator[None]:
        """Count the time inside towards ``timing/<stage>``; a stage may come several times.

        Args:
            stage: its name.
            step: the step that it works on; the run's if it is left out.
            version: the policy version that it works with.
            seconds: of that step, to be added with ``add`` when its row is due; the current row's if left out.
        """
        self._here.place = _Place(stage, step, version)
        into = self.seconds if seconds is None else seconds
        roles = self._at_work(stage)
        begin = self._pools.begin(stage, roles)
        try:
            yield
        finally:
            end = self._pools.end(stage, roles)
            into[stage] = into.get(stage, 0.0) + end - begin
            self._observer.stage(self._span(begin, end), [role for role in roles if role in self._roles])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The trainer needs what is done inside before it can go on; its own work in there is no waiting."""
        begin, worked = self._now(), self._pools.row().busy["train"]
        try:
            yield
        finally:
            row = self._pools.row()
            self._waited += row.at - begin - (row.busy["train"] - worked)

    def called(self, worker: str, begin: float) -> None:
        """A worker has answered a call that this thread made at ``begin``, seconds of ``time.perf_counter``."""
        self._observer.call(worker, self._span(begin, self._now()))

    def _span(self, begin: float, end: float) -> Span:
        stage, step, version = self._place_here
        return Span(stage, 0 if stage == "start" else step + 1, version, begin, end)

    def _at_work(self, stage: str) -> tuple[str, ...]:
        if stage == "eval":
            return self._roles
        if stage == "ref" and "ref" not in self._roles:
            return ("train",)
        return _AT_WORK.get(stage, ())

    def add(self, seconds: Mapping[str, float]) -> None:
        """What a step took before its turn is of its row."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def timings(self) -> Metrics:
        """``timing/*`` and ``pipeline/*`` of a step's row; what comes now counts for the next row.

        ``timing/all`` is the step without its evaluation, ``timing/save`` what was saved since the row before. The idle
        time of a pool is its share of all the time since the row before, and so are the waits its seconds.
        """
        seconds, self.seconds = self.seconds, {"save": 0.0}
        whole = self._now() - self._started - seconds.get("eval", 0.0)
        return {
            **{f"timing/{stage}": value for stage, value in seconds.items()},
            "timing/all": whole,
            **self._since_last_row(),
        }

    def _since_last_row(self) -> Metrics:
        waited, self._waited = self._waited, 0.0
        before, self._row = self._row, self._pools.row()
        starved = self._pools.starved()
        if before is None:
            return {}
        row, found = self._row, Metrics()
        for role in self._roles:
            share = (row.busy[role] - before.busy[role]) / max(row.at - before.at, 1e-9)
            found[f"timing/idle_{role}"] = min(max(1.0 - share, 0.0), 1.0)
        if "infer" in self._roles:
            found |= {"pipeline/wait_rollout_s": waited, "pipeline/wait_train_s": starved}
        return found


@dataclass(frozen=True, slots=True)
class _Row:
    """A moment, and how long each pool has been at work until then, seconds."""

    at: float
    busy: dict[str, float]


class _Pools:
    """Who is at work. Stages of one pool may overlap in threads: its time is that of their union."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._under_way = dict.fromkeys(("train", "infer", "ref", "reward"), 0)  # stages
        self._since = dict.fromkeys(self._under_way, 0.0)
        self._busy = dict.fromkeys(self._under_way, 0.0)
        self._sampled_at: float | None = None  # the engines have nothing to sample since then, and wait for a push
        self._starved = 0.0

    def begin(self, stage: str, roles: Sequence[str]) -> float:
        """The moment at which the work began."""
        with self._lock:
            now = self._now()
            for role in roles:
                if not self._under_way[role]:
                    self._since[role] = now
                self._under_way[role] += 1
            if stage == "sync":
                self._count_starved(now)
            if stage in ("gen", "sync"):
                self._sampled_at = None
            return now

    def end(self, stage: str, roles: Sequence[str]) -> float:
        """The moment at which the work ended."""
        with self._lock:
            now = self._now()
            for role in roles:
                self._under_way[role] -= 1
                if not self._under_way[role]:
                    self._busy[role] += now - self._since[role]
            if stage == "gen":
                self._sampled_at = now
            return now

    def row(self) -> _Row:
        """How long everybody has worked until now."""
        with self._lock:
            now = self._now()
            open_s = {role: now - self._since[role] if count else 0.0 for role, count in self._under_way.items()}
            return _Row(now, {role: self._busy[role] + open_s[role] for role in open_s})

    def starved(self) -> float:
        """Seconds that the engines have waited for the trainer since this was asked last."""
        with self._lock:
            self._count_starved(self._now())
            self._sampled_at = None
            starved, self._starved = self._starved, 0.0
            return starved

    def _count_starved(self, now: float) -> None:
        if self._sampled_at is not None:
            self._starved += now - self._sampled_at
