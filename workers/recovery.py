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
from rlxf.core.errors import RlxfError, RunInterrupted, WorkerLost, notes_of
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
        takes_turns: the engines share the trainer's devices.
    """

    def __init__(
        self,
        crew: Crew,
        engines: RemoteEngines | None,
        clock: Clock,
        stop: Stop,
        now: Callable[[], float] = time.monotonic,
        *,
        takes_turns: bool = False,
    ) -> None:
        self._takes_turns = takes_turns
        self._crew, self._engines, self._clock, self._stop, self._now = crew, engines, clock, stop, now
        self._times: deque[float] = deque()

    def begin_again(self, found: Prepared, error: Exception) -> Prepared:
        """The run as it goes on from its last checkpoint, with new processes; ``error`` is what ended the loop.

        Raises:
            Exception: ``error``, if no process with state was lost or the user ends the run.
            RunInterrupted: that was too often, or devices are missing.
        """
        limit = found.config.resilience.max_recoveries
        # In this order: a signal to the whole job ends Ray's head, too, and whoever asks it who is gone waits for good.
        if self._stop.requested or not limit or not self._gone():
            raise error
        complete = (error.complete_steps or 0) if isinstance(error, RlxfError) else self._clock.step
        begin, lost = self._now(), error
        while True:
            self._tell(lost, complete + 1)
            self._count(limit, lost)
            try:
                self._start_all_again(lost)
                break
            except WorkerLost as second:  # while they load
                if not self._gone():
                    raise
                lost = second
        with self._stop.interruptible():
            again = replace(found, resume=find_again(found))
        self._clock.begin_again()
        steps = again.resume.state.step if again.resume else 0
        seconds, dropped = self._now() - begin, max(complete - steps, 0)
        log.info(
            "the trainer was started again in %.1f s and goes on from %s: %d complete steps are done again",
            seconds,
            f"{again.resume.folder.name}, step {steps}" if again.resume else "the beginning",
            dropped,
            extra=event("rebuilt", who="train", step=complete + 1, seconds=seconds, steps_lost=dropped),
        )
        return again

    def _gone(self) -> list[str]:
        """Roles with state that have lost a process."""
        return sorted(role for role, group in self._crew.stateful.items() if self._crew.gone(group))

    def _tell(self, lost: Exception, step: int) -> None:
        phase = lost.stage if isinstance(lost, WorkerLost) else None
        log.warning("%s", lost, extra=event("lost", who=", ".join(self._gone()), phase=phase, step=step))

    def _start_all_again(self, lost: Exception) -> None:
        """New processes for all ranks with state, loaded; the engines know of it."""
        with self._stop.interruptible():
            if self._engines is not None and self._takes_turns:
                self._engines.make_room(WorkerLost(str(lost)))
            for group in self._crew.stateful.values():
                calls = self._crew.start_again(group, range(len(group.members)), WorkerLost(str(lost)), told=True)
                self._crew.wait_for_loading(calls)
                self._crew.forget(group)
            if self._engines is not None:
                self._engines.begin_again()

    def _count(self, limit: int, error: Exception) -> None:
        now = self._now()
        while self._times and now - self._times[0] > WINDOW_S:
            self._times.popleft()
        if len(self._times) >= limit:
            interrupted = RunInterrupted(
                f"{error}\nthe trainer was started again {len(self._times)} times within an hour, which is "
                f"resilience.max_recoveries = {limit}"
            )
            for note in notes_of(error):  # what was saved
                interrupted.add_note(note)
            raise interrupted from error
        self._times.append(now)
