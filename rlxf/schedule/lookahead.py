"""Sampling runs ahead of training by ``k`` driver steps, exactly: the schedule of a run.

Boundary ``b`` is the moment at which ``b`` steps are complete and the engines have nothing to do. There the driver
pushes the new weights W(b), evaluates and saves. Then two things begin together: the engines sample step ``b + k``
with W(b), and the trainer updates on step ``b``, which waits here since it was sampled. For ``k = 1``, with the
sampling of step ``s`` written Ss, its scores and reference Rs, and its update Us:

                 start        boundary 0            boundary 1            boundary 2
    engines      | S0         | S1 (W0) ......      | S2 (W1) .....       | S3 (W2)
    reward, ref  |     R0     |         R1 ....     |          R2 ..      |
    trainer      |            | U0 -> W1            | U1 -> W2            | U2 -> W3
                 push W0                      push W1               push W2

So step ``s`` trains on completions that W(max(f, s - k)) sampled, where the run, or what a resumed run samples anew,
begins with step ``f``. Nothing depends on how long a stage takes. At ``k = 0`` the update follows its own sampling.

Nothing here knows what a step is made of. A step is collected in stages, each of which does one step at a time, in the
order of the steps. A stage runs on a lane (``lanes.py``), and a lane does one piece of work at a time. A stage that
streams begins while the one before it is still at work on the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from rlxf.schedule.lanes import Lanes

R = TypeVar("R")


class Step(Protocol):
    """A step that is being collected."""

    @property
    def step(self) -> int:
        """Its number; 0 is the first."""
        ...


S = TypeVar("S", bound=Step)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stage(Generic[S]):
    """One part of collecting a step."""

    name: str
    lane: str  # who does it
    is_done: Callable[[S], bool]
    work: Callable[[S], None]  # puts what it makes into the step
    late: bool = False  # only when the step's turn to be trained on has come
    # It takes what the stage before it makes of the step part by part (``parts.py``), and begins beside it if it can.
    streams: bool = False


class Lookahead(Generic[S]):
    """Collects steps, ``num_ahead`` of them before their turn.

    The driver calls ``take`` at each boundary, ``beside`` for the update, ``sampled`` before the next boundary, and
    ``beside`` for its push.

    Args:
        stages: in order; the first one samples.
        lanes: how they are run.
        make: a step that is sampled at a boundary: (number of the step, boundary).
        num_ahead: k.
        num_steps: of the run; nothing is sampled for steps behind the last one.
        steps: those that are sampled, or being sampled, and not trained on yet, in order: at first those of a resumed
            run that an earlier process left. The schedule keeps it up to date.
        meanwhile: called before each wait, when all that can begin has begun.
    """

    def __init__(
        self,
        stages: Sequence[Stage[S]],
        lanes: Lanes,
        make: Callable[[int, int], S],
        *,
        num_ahead: int,
        num_steps: int,
        steps: deque[S],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self._stages = tuple(stages)
        self._lanes = lanes
        self._make = make
        self._num_ahead = num_ahead
        self._num_steps = num_steps
        self._steps = steps
        self._meanwhile = meanwhile
        while steps and steps[-1].step >= num_steps:  # the earlier run was to be longer
            steps.pop()
        self._turn = -1  # the step that is taken
        self._running: dict[Stage[S], tuple[S, Future[None]]] = {}
        self._main_lane: str | None = None  # of the work that the others go on beside
        self._failure: Exception | None = None  # of a stage beside the work of ``beside``

    def take(self, step: int) -> S:
        """At boundary ``step``: begin to sample the step ``num_ahead`` further on; the step to train on, collected.

        Raises:
            RlxfError: whatever a stage raised.
        """
        while self._steps and self._steps[0].step < step:
            self._steps.popleft()
        self._turn = step
        starts = not self._steps  # nothing is waiting: the run begins, and no update is made beside the first samples
        last = min(step + self._num_ahead, self._num_steps - 1)
        for number in range(self._steps[-1].step + 1 if self._steps else step, last + 1):
            self._steps.append(self._make(number, step))
        if starts:
            self._run_until(lambda: self._is_sampled(step + self._num_ahead))
        taken = self._steps[0]
        assert taken.step == step  # steps are taken one after the other
        self._run_until(lambda: self._is_collected(taken))
        return taken

    def beside(self, lane: str, work: Callable[[], R]) -> R:
        """What ``work`` gives, done while the stages of later steps go on, but for those of the same lane.

        What fails meanwhile does not cut it: whatever is called next but ``beside`` raises the error.
        """
        self._main_lane = lane  # no other work begins on it
        try:
            self._run_until(lambda: all(stage.lane != lane for stage in self._running))
            future: Future[Any] = self._lanes.start(lane, work)
            while not future.done():
                self._quietly(self._meanwhile)
                under_way = [] if self._failure else [other for _, other in self._running.values()]
                self._lanes.wait([future, *under_way])
                self._quietly(self._go_on)
            result: R = future.result()
        finally:
            self._main_lane = None
        return result

    def sampled(self) -> None:
        """Return when the engines have nothing to do.

        Raises:
            RlxfError: whatever a stage raised since the step was taken.
        """
        self._run_until(lambda: not self.unsampled())

    def drained(self) -> None:
        """Return when all that can be collected before its turn is collected: no stage is at work."""
        self._run_until(lambda: not self._running)

    def unsampled(self) -> list[S]:
        """Steps whose sampling has not ended, in order."""
        return [item for item in self._steps if not self._has(self._stages[0], item)]

    def _is_sampled(self, before: int) -> bool:
        return all(self._has(self._stages[0], item) for item in self._steps if item.step < before)

    def _is_collected(self, item: S) -> bool:
        return all(self._has(stage, item) for stage in self._stages)

    def _has(self, stage: Stage[S], item: S) -> bool:
        """Whether a step has been through a stage, and the stage's work has ended."""
        return stage.is_done(item) and not self._is_at(stage, item)

    def _run_until(self, is_done: Callable[[], bool]) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self._go_on()
        while not is_done():
            assert self._running, f"nothing would end this wait: {self._missing()}"
            self._meanwhile()
            self._lanes.wait([future for _, future in self._running.values()])
            self._go_on()

    def _missing(self) -> str:
        """The steps and the stages that they have not been through, for a message."""
        found = ((item.step, stage.name) for item in self._steps for stage in self._stages if not stage.is_done(item))
        return ", ".join(f"step {step} lacks {name}" for step, name in found)

    def _quietly(self, action: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                action()
        except Exception as error:  # noqa: BLE001  raised once the update is complete
            self._failure = error

    def _go_on(self) -> None:
        """Take the results of what has ended, and begin what can begin."""
        while self._take_results() | self._start_stages():
            continue

    def _take_results(self) -> bool:
        ended = [stage for stage, (_, future) in self._running.items() if future.done()]
        for stage in ended:
            self._running.pop(stage)[1].result()
        return bool(ended)

    def _start_stages(self) -> bool:
        """Begin what can begin. Where stages share a lane, the older step goes first: its update is needed sooner."""
        started = False
        waiting: list[tuple[int, int, S]] = []
        for index, stage in enumerate(self._stages):
            item = next((item for item in self._steps if not stage.is_done(item)), None)
            if item is not None:
                waiting.append((item.step, index, item))
        for _, index, item in sorted(waiting, key=lambda one: one[:2]):
            stage = self._stages[index]
            if self._can_start(stage, item, self._stages[:index]):
                self._running[stage] = item, self._lanes.start(stage.lane, partial(stage.work, item))
                started = True
        return started

    def _can_start(self, stage: Stage[S], item: S, before: Sequence[Stage[S]]) -> bool:
        busy = {other.lane for other in self._running} | {self._main_lane}
        if stage in self._running or stage.lane in busy or (stage.late and item.step != self._turn):
            return False
        streams = stage.streams and self._lanes.overlap
        return all(self._has(earlier, item) or (streams and self._is_at(earlier, item)) for earlier in before)

    def _is_at(self, stage: Stage[S], item: S) -> bool:
        """Whether a stage is at work on a step."""
        return stage in self._running and self._running[stage][0] is item
