"""What one stage of a step hands to the next one bit by bit, while both are at work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
_TICK_S = 0.2  # how often whoever waits looks whether it has to give up


class Parts(Generic[T]):
    """Parts of a step: one stage puts them in, the next one takes each as soon as it is there, perhaps in a thread.

    They stay, so that a stage that begins late gets all of them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[T] = []
        self._ended = False
        self._failure: BaseException | None = None

    @property
    def is_empty(self) -> bool:
        """No part has come yet."""
        return not self._parts

    def put(self, part: T) -> None:
        """One more is there."""
        with self._changed:
            self._parts.append(part)
            self._changed.notify_all()

    @contextmanager
    def made(self) -> Iterator[None]:
        """Wraps the work that puts parts in: there are no more afterwards. Whoever waits for one gets its error."""
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def follow(self, check: Callable[[], None]) -> Iterator[T]:
        """Each part in the order in which it came; waits for those that are not there yet.

        Args:
            check: asked while it waits; raises if nobody needs the parts any more.

        Raises:
            BaseException: what has ended the work that makes them.
        """
        taken = 0
        while True:
            with self._changed:
                while taken == len(self._parts) and not self._ended:
                    self._changed.wait(_TICK_S)
                    check()
                if taken == len(self._parts):
                    if self._failure is not None:
                        raise self._failure
                    return
                part = self._parts[taken]
            taken += 1
            yield part

    def _end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._ended, self._failure = True, failure
            self._changed.notify_all()
