"""A process of its own for the user's Python code: it may hang or crash, and the run goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Generic, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from rlxf.core.errors import RlxfError
from rlxf.core.events import event
from rlxf.core.stop import Stop

Made = TypeVar("Made")
Given = TypeVar("Given")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

TICK_S = 0.2  # how often a wait looks at the stop request
_START_S = 600.0  # for imports that the user's code makes: of a model, for example

_made: Any = None  # in the process: what `make` returned


class _ProcessLost(Exception):
    """A process ended in the middle of a call."""


class UserProcess(Generic[Made]):
    """Objects that ``make`` returns, each in a process of its own, and calls of them with a time limit.

    A call that takes too long raises ``failed``; its process is ended, and the next call gets a new one, with a new
    object. A call whose process ends is made again, once, in a new one; if that one ends, too, it raises ``failed``.

    Args:
        make: makes the object; a function at the top of a module, or a ``functools.partial`` of one.
        name: how messages name it: ``reward.function=my.py``.
        workers: processes.
        timeout_s: longest time of a call, in seconds.
        stop: ends a wait early when the user asked for it.
        failed: the error of a call without an answer.
        limit: the key that sets ``timeout_s``, for messages.
    """

    def __init__(
        self,
        make: Callable[[], Made],
        name: str,
        *,
        workers: int,
        timeout_s: float,
        stop: Stop,
        failed: type[RlxfError],
        limit: str,
    ) -> None:
        self._make, self._name, self._timeout_s = make, name, timeout_s
        self._stop, self._failed, self._limit = stop, failed, limit
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._pool = ProcessPool(max_workers=workers, context=context, initializer=_leave_with_parent)

    def start(self) -> None:
        """Make the object, so that what is wrong with it is told now.

        Raises:
            RlxfError: whatever ``make`` raised.
        """
        try:
            self.call(_ready, [None], timeout_s=_START_S)
        except BaseException:
            self.close()
            raise

    def call(
        self, use: Callable[[Made, Given], Result], given: Sequence[Given], *, timeout_s: float | None = None
    ) -> list[Result]:
        """``use(object, item)`` for each item, in the processes.

        Raises:
            StopRequested: the user ended the run.
            RlxfError: ``failed``, or whatever the user's code raised.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        futures: list[ProcessFuture[Result]] = []

        def begin(item: Given) -> ProcessFuture[Result]:
            futures.append(self._pool.schedule(_use, args=(self._make, use, item), timeout=limit))
            return futures[-1]

        try:
            first = [begin(item) for item in given]
            return [
                self._answer(future, limit, partial(begin, item)) for future, item in zip(first, given, strict=True)
            ]
        finally:
            for future in futures:
                future.cancel()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End the processes, busy ones too."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _answer(
        self, future: ProcessFuture[Result], limit: float, again: Callable[[], ProcessFuture[Result]]
    ) -> Result:
        try:
            return self._wait(future, limit)
        except _ProcessLost as lost:
            log.warning("%s; the call is made again", lost, extra=event("lost", who=self._name))
            begin = time.monotonic()
        try:
            result = self._wait(again(), limit)
        except _ProcessLost as lost:
            raise self._failed(f"{lost}, for the second time; the next call gets a new one") from lost
        seconds = time.monotonic() - begin
        what = event("recovered", who=self._name, seconds=seconds, steps_lost=0)
        log.info("%s: a new process has answered after %.1f s", self._name, seconds, extra=what)
        return result

    def _wait(self, future: ProcessFuture[Result], limit: float) -> Result:
        while True:
            if self._stop.must_give_up():
                raise self._stop.error(f"stopped while waiting for {self._name}")
            try:
                return future.result(timeout=TICK_S)
            except FutureTimeout as error:
                if not future.done():
                    continue
                raise self._failed(
                    f"{self._name}: no answer within {self._limit} = {limit:g} s; its process was ended, and the next "
                    "call gets a new one"
                ) from error
            except (ProcessExpired, BrokenProcessPool, CancelledError) as error:
                code = f", exit code {error.exitcode}" if isinstance(error, ProcessExpired) else ""
                raise _ProcessLost(f"{self._name}: its process ended in the middle of a call{code}") from error
            except RlxfError:
                raise
            except Exception as error:  # what the user's code returned cannot be sent, for example
                raise self._failed(f"{self._name}: {type(error).__name__}: {error}") from error


def _use(make: Callable[[], Made], use: Callable[[Made, Given], Result], given: Given) -> Result:
    """In the process: ``use`` on the object, which the first call makes."""
    global _made
    try:
        if _made is None:
            _made = make()
        return use(_made, given)
    except (SystemExit, KeyboardInterrupt) as error:  # in the run's process it would end the run without a word
        raise RuntimeError(f"it called for the end of its process ({type(error).__name__}: {error})") from error


def _ready(_made: object, _given: None) -> None:
    """The object is there."""


def _leave_with_parent() -> None:
    """However the run ends, this process ends, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
