"""Who does a stage's work, and how the schedule waits for it: in this thread, or in a thread for each lane.

A lane is a pool of devices that does one piece of work at a time: the engines, the reward model, the reference, the
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Protocol, TypeVar

from rlxf.core.stop import Stop
from rlxf.core.waiting import in_thread

T = TypeVar("T")
LEAVE_S = 5.0  # how long threads may take to notice that nobody needs them any more


class Lanes(Protocol):
    """Starts work and waits for it."""

    @property
    def overlap(self) -> bool:
        """Whether work goes on beside other work: one piece may wait for what another one makes."""
        ...

    def start(self, lane: str, work: Callable[[], T]) -> Future[T]:
        """Begin ``work`` on a lane that has nothing to do."""
        ...

    def wait(self, futures: Collection[Future[None]]) -> None:
        """Return when at least one of them is done."""
        ...

    def close(self) -> None:
        """Nothing that is under way is needed any more."""
        ...


class OneAfterTheOther:
    """All work is done in the thread that starts it: ``runtime=local``, and runs that neither look ahead nor stream."""

    overlap = False

    def start(self, lane: str, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  whoever asks for the result gets it
            future.set_exception(error)
        return future

    def wait(self, futures: Collection[Future[None]]) -> None:
        """They are done."""

    def close(self) -> None:
        """Nothing is under way."""


class InThreads:
    """Each piece of work has a thread, which waits for remote processes. A signal stops all of them but the update.

    Args:
        stop: the run's signals; a thread of work that may be dropped gives up at the first one.
    """

    overlap = True

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._under_way: set[Future[None]] = set()

    def start(self, lane: str, work: Callable[[], T]) -> Future[T]:
        def in_background() -> T:
            with self._stop.in_background():
                return work()

        future = in_thread(in_background, lane)
        self._under_way = {other for other in self._under_way if not other.done()} | {future}  # type: ignore[arg-type]
        return future

    def wait(self, futures: Collection[Future[None]]) -> None:
        wait_for(futures, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Threads give up their waits; the process is not left to shut down under their feet."""
        self._stop.leave_background()
        wait_for(self._under_way, timeout=LEAVE_S)
