"""After the loss of processes whose state is in checkpoints: all of them start again, and the run from its last one.

That happens inside the run, as if the same command had been typed again; what is left of the other roles stays loaded.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from rlxf.assembly.start import Prepared, find_again
from rlxf.core.clock import Clock
from rlxf.core.errors import RlxfError, RunInterrupted, WorkerLost
from rlxf.core.events import event
from rlxf.core.stop import Stop

from .crew import Crew
from .rollout import RemoteEngines

log = logging.getLogger(__name__)

WINDOW_S = 3600.0  # resilience.max_recoveries are as many in this time


class Recovery:
    """Rebuilds the trainer, and counts how often.

    Args:
        crew: the run's workers.
        engines: get the rebuilt trainer's weights; None: a run without them.
        clock: of the run.
        stop: a run that the user ends is not rebuilt.
        now: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        crew: Crew,
        engines: RemoteEngines | None,
        clock: Clock,
        stop: Stop,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew, self._engines, self._clock, self._stop, self._now = crew, engines, clock, stop, now
        self._times: deque[float] = deque()

    def begin_again(self, found: Prepared, error: RlxfError) -> Prepared:
        """The run as it goes on from its last checkpoint, with new processes; ``error`` is what ended the loop.

        Raises:
            RlxfError: ``error``, if no process with state was lost or the user ends the run.
            RunInterrupted: that was too often, or devices are missing.
        """
        limit = found.config.resilience.max_recoveries
        lost = {role for role, group in self._crew.stateful.items() if self._crew.gone(group)}
        if not lost or not limit or self._stop.requested:
            raise error
        begin = self._now()
        self._count(limit, begin, error)
        phase = error.stage if isinstance(error, WorkerLost) else None
        step = (error.complete_steps or 0) + 1
        what = event("lost", who=", ".join(sorted(lost)), phase=phase, step=step)
        log.warning("%s", error, extra=what)
        with self._stop.interruptible():
            for group in self._crew.stateful.values():
                calls = self._crew.start_again(group, range(len(group.members)), WorkerLost(str(error)), told=True)
                self._crew.wait_for_loading(group, calls)
                self._crew.forget(group)
            if self._engines is not None:
                self._engines.begin_again()
            again = replace(found, resume=find_again(found))
        self._clock.begin_again()
        steps = again.resume.state.step if again.resume else 0
        seconds, dropped = self._now() - begin, (error.complete_steps or 0) - steps
        log.info(
            "the trainer was started again in %.1f s and goes on from %s: %d complete steps are done again",
            seconds,
            f"{again.resume.folder.name}, step {steps}" if again.resume else "the beginning",
            dropped,
            extra=event("rebuilt", who="train", step=step, seconds=seconds, steps_lost=dropped),
        )
        return again

    def _count(self, limit: int, now: float, error: RlxfError) -> None:
        while self._times and now - self._times[0] > WINDOW_S:
            self._times.popleft()
        if len(self._times) >= limit:
            raise RunInterrupted(
                f"{error}\nthe trainer was started again {len(self._times)} times within an hour, which is "
                f"resilience.max_recoveries = {limit}"
            ) from error
        self._times.append(now)
