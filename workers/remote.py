"""The only wait for remote work. It has a deadline, ends at a lost worker or a stop request, and names the call.

A worker that hangs is ended while somebody waits for it, and is lost then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from rlxf.core.clock import Clock
from rlxf.core.errors import RlxfError, StageTimeout, WorkerLost
from rlxf.core.stop import Stop

from .memory import MemoryAtEnd

log = logging.getLogger(__name__)

TICK_S = 0.5  # how often a wait looks at the stop request
DEATHS = (RayActorError, ObjectLostError, OutOfMemoryError)
ENDED_S = 30.0  # how long Ray may take to notice that a worker has been ended
BLAME_S = 2.0  # when one rank fails, how long to look for a worker whose death is the cause


@dataclass(frozen=True, slots=True)
class Pending:
    """One outstanding remote call, and its names for people."""

    ref: Any
    worker: str  # "train rank 0 on node 10.0.0.1"
    call: str  # "update"
    made_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call: its result, or how its worker was lost."""

    call: Pending
    value: Any = None
    lost: WorkerLost | None = None


class Watched(Protocol):
    """Who knows which workers hang (``watch.py``)."""

    def end_hung(self, names: Collection[str], place: str) -> None:
        """End each of these workers that hangs."""
        ...

    def end_overdue(self, names: Collection[str], place: str) -> bool:
        """End those of these workers that are still at work; whether there is one."""
        ...

    def why_ended(self, name: str) -> str | None:
        """Why a worker was ended; None: it was not."""
        ...

    def mark_gone(self, name: str) -> None:
        """A call said that the worker is lost, which Ray may not have noted yet."""
        ...

    def memory_at_end(self, name: str) -> MemoryAtEnd | None:
        """What is known of the memory of a worker that has died; None: nothing."""
        ...


class Waiter:
    """Waits for remote calls on behalf of one run.

    Args:
        clock: knows the stage and step of the run, and is told of each answer.
        stop: ends a wait early when the user asked for it.
        timeout_s: longest wait, unless a call brings its own.
        logs: where people find what the workers wrote.
        watch: ends workers that hang; None: nobody does, and a wait that takes too long is an error.
    """

    def __init__(
        self,
        clock: Clock,
        stop: Stop,
        timeout_s: float,
        logs: str = "Ray's session folder",
        watch: Watched | None = None,
    ) -> None:
        self.clock = clock
        self._watch = watch
        self._stop = stop
        self._timeout_s = timeout_s
        self._logs = logs

    def gather(self, calls: Sequence[Pending], timeout_s: float | None = None) -> list[Any]:
        """The results of ``calls``, in their order.

        Raises:
            WorkerLost: a worker died. When others failed because of that, the death is what is reported.
            StageTimeout: the deadline passed.
            StopRequested: a signal came, and the stage may be abandoned.
            RlxfError: whatever the remote room raised.
        """
        deadline = _Deadline(self._timeout_s if timeout_s is None else timeout_s, is_own=timeout_s is not None)
        waiting = {call.ref: call for call in calls}
        results: dict[Any, Any] = {}
        while waiting:
            ref = self._next(waiting, deadline)
            try:
                results[ref] = ray.get(ref, timeout=max(deadline.left, TICK_S))
            except RayError as error:
                raise self._blame(error, waiting.pop(ref), waiting) from error
            call = waiting.pop(ref)
            self.clock.called(call.worker, call.made_at)
        return [results[call.ref] for call in calls]

    def first(self, calls: Iterable[Pending]) -> Answer:
        """The first answer to one of ``calls``. A death is an answer, too; what the remote room raised is raised."""
        waiting = {call.ref: call for call in calls}
        deadline = _Deadline(self._timeout_s, is_own=False)
        call = waiting[ref := self._next(waiting, deadline)]
        try:
            value = ray.get(ref, timeout=max(deadline.left, TICK_S))
        except RayError as error:
            if not _is_death(error):
                raise self._translate(error, call) from error
            lost = self._translate(error, call)
            assert isinstance(lost, WorkerLost)
            return Answer(call, lost=lost)
        self.clock.called(call.worker, call.made_at)
        return Answer(call, value)

    def rest(self, seconds: float) -> None:
        """Wait for nothing but the time.

        Raises:
            StopRequested: a signal came, and the stage may be abandoned.
        """
        if self._stop.must_give_up():
            raise self._stop.error("stopped while waiting for devices")
        time.sleep(min(seconds, TICK_S))

    def _next(self, waiting: dict[Any, Pending], deadline: _Deadline) -> Any:
        """The reference of a call that is answered, whether well or not."""
        while True:
            if self._stop.must_give_up():
                raise self._stop.error(f"stopped while waiting for {self._describe(waiting)}")
            left = deadline.left
            names = {call.worker for call in waiting.values()}
            if self._watch is not None:
                self._watch.end_hung(names, self.clock.place)
            if left <= 0 and self._is_over(names, deadline):
                raise StageTimeout(
                    f"{self.clock.place}: no answer within {deadline.limit:g} s from {self._describe(waiting)}; look "
                    f"at the workers' logs ({self._logs}), or raise training.stage_timeout_s "
                    "(training.start_timeout_s while loading)"
                )
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(TICK_S, max(left, 0.0)))
            if ready:
                return ready[0]

    def _is_over(self, names: Collection[str], deadline: _Deadline) -> bool:
        """Whether a wait whose time is over ends; if not, the workers that took too long are ended, and so it does."""
        if deadline.is_over or self._watch is None or not self._watch.end_overdue(names, self.clock.place):
            return True
        deadline.extend(ENDED_S)
        return False

    def _blame(self, error: RayError, call: Pending, others: dict[Any, Pending]) -> Exception:
        """The error to report: a dead worker before the failures that its death caused in others."""
        failures = [(error, call)]
        deadline = time.monotonic() + BLAME_S
        while others and not _is_death(failures[-1][0]) and time.monotonic() < deadline:
            ready, _ = ray.wait(list(others), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            for ref in ready:
                other = others.pop(ref)
                try:
                    ray.get(ref, timeout=TICK_S)
                except RayError as failure:
                    failures.append((failure, other))
        return self._translate(*next((f for f in failures if _is_death(f[0])), failures[0]))

    def cause(self, error: Exception, others: Iterable[Pending]) -> Exception:
        """The loss of a worker that others noticed before Ray told of it; ``error``, if there is none.

        ``others``: calls that are not awaited yet.
        """
        deadline = time.monotonic() + BLAME_S
        waiting = {call.ref: call for call in others}
        while waiting and time.monotonic() < deadline:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            for ref in ready:
                call = waiting.pop(ref)
                try:
                    ray.get(ref, timeout=TICK_S)
                except RayError as failure:
                    if _is_death(failure):
                        return self._translate(failure, call)
        return error

    def _translate(self, error: RayError, call: Pending) -> Exception:
        if isinstance(error, DEATHS):
            died = _is_death(error)
            who = call.worker if died else f"a worker that {call.worker} needed an answer from"
            if died and self._watch is not None:
                self._watch.mark_gone(call.worker)
            reason = self._why_died(error, call.worker) if died else _first_lines(error)
            lost = WorkerLost(f"{self.clock.place}: lost {who} during {call.call}: {reason} Logs: {self._logs}")
            lost.stage = self.clock.stage_here
            return lost
        if isinstance(error, GetTimeoutError):
            return StageTimeout(f"{self.clock.place}: the result of {call.call} from {call.worker} did not arrive")
        if isinstance(error, RayTaskError) and isinstance(error.cause, RlxfError):
            cause: RlxfError = error.cause
            return cause
        other: Exception = error
        return other

    def _why_died(self, error: RayError, name: str) -> str:
        """Why a worker is gone, as far as somebody knows."""
        ended = self._watch.why_ended(name) if self._watch is not None else None
        if ended:
            return f"it was ended, because of {ended}."
        memory = self._watch.memory_at_end(name) if self._watch is not None else None
        full = isinstance(error, OutOfMemoryError)
        if memory is None:
            return f"killed for want of memory (OOM). {_first_lines(error)}" if full else _first_lines(error)
        sentence = memory.sentence(said_by_ray=full)
        if memory.kills or full:
            return f"{sentence}. {_first_lines(error)}"
        return f"{_first_lines(error)} {sentence[0].upper()}{sentence[1:]}."

    @staticmethod
    def _describe(waiting: dict[Any, Pending]) -> str:
        names = [f"{call.call} of {call.worker}" for call in waiting.values()]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _Deadline:
    """When a wait has to end, and can be extended once.

    ``is_own``: the call brought its limit, and whoever made it deals with the error: it is not extended.
    """

    def __init__(self, limit: float, *, is_own: bool) -> None:
        self.limit, self.is_over = limit, is_own
        self._at = time.monotonic() + limit

    @property
    def left(self) -> float:
        """Seconds."""
        return self._at - time.monotonic()

    def extend(self, seconds: float) -> None:
        """From now on as many seconds as that, and then it is over."""
        self.is_over = True
        self._at = time.monotonic() + seconds


def answer_within(reference: Any, seconds: float) -> Any:
    """The answer to one call outside of a run's waits; None: there was none in time, or it failed."""
    try:
        ready, _ = ray.wait([reference], timeout=seconds)
        return ray.get(ready[0], timeout=TICK_S) if ready else None
    except RayError as error:
        log.debug("no answer: %s", error)
        return None


def _is_death(error: RayError) -> bool:
    """Whether the worker itself is lost. A task error of that kind tells of another one, whose answer it was given."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def _first_lines(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])
