"""The only wait for remote work. It has a deadline, ends at a lost worker or a stop request, and names the call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from rlxf.core.clock import Clock
from rlxf.core.errors import RlxfError, StageTimeout, WorkerLost
from rlxf.core.stop import Stop

TICK_S = 0.5  # how often a wait looks at the stop request
DEATHS = (RayActorError, ObjectLostError)
BLAME_S = 2.0  # when one rank fails, how long to look for a worker whose death is the cause


@dataclass(frozen=True, slots=True)
class Pending:
    """One outstanding remote call, and its names for people."""

    ref: Any
    worker: str  # "train rank 0 on node 10.0.0.1"
    call: str  # "update"
    made_at: float = field(default_factory=time.perf_counter)


class Waiter:
    """Waits for remote calls on behalf of one run.

    Args:
        clock: knows the stage and step of the run, and is told of each answer.
        stop: ends a wait early when the user asked for it.
        timeout_s: longest wait, unless a call brings its own.
        logs: where people find what the workers wrote.
    """

    def __init__(self, clock: Clock, stop: Stop, timeout_s: float, logs: str = "Ray's session folder") -> None:
        self.clock = clock
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
        limit = timeout_s if timeout_s is not None else self._timeout_s
        deadline = time.monotonic() + limit
        waiting = {call.ref: call for call in calls}
        results: dict[Any, Any] = {}
        while waiting:
            if self._stop.must_give_up():
                raise self._stop.error(f"stopped while waiting for {self._describe(waiting)}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise StageTimeout(
                    f"{self.clock.place}: no answer within {limit:g} s from {self._describe(waiting)}; look at the "
                    f"workers' logs ({self._logs}), or raise training.stage_timeout_s (training.start_timeout_s while "
                    "loading)"
                )
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(TICK_S, left))
            for ref in ready:
                try:
                    results[ref] = ray.get(ref, timeout=max(left, TICK_S))
                except RayError as error:
                    raise self._blame(error, waiting.pop(ref), waiting) from error
                call = waiting.pop(ref)
                self.clock.called(call.worker, call.made_at)
        return [results[call.ref] for call in calls]

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

    def _translate(self, error: RayError, call: Pending) -> Exception:
        if isinstance(error, DEATHS):
            who = call.worker if _is_death(error) else f"a worker that {call.worker} needed an answer from"
            return WorkerLost(
                f"{self.clock.place}: lost {who} during {call.call}: {_first_lines(error)} Logs: {self._logs}"
            )
        if isinstance(error, GetTimeoutError):
            return StageTimeout(f"{self.clock.place}: the result of {call.call} from {call.worker} did not arrive")
        if isinstance(error, RayTaskError) and isinstance(error.cause, RlxfError):
            cause: RlxfError = error.cause
            return cause
        other: Exception = error
        return other

    @staticmethod
    def _describe(waiting: dict[Any, Pending]) -> str:
        names = [f"{call.call} of {call.worker}" for call in waiting.values()]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_death(error: RayError) -> bool:
    """Whether the worker itself is lost. A task error of that kind tells of another one, whose answer it was given."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def _first_lines(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])
