"""Waits that end: work in a thread that cannot keep a process alive, and child processes that can be killed."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def in_thread(action: Callable[[], T], name: str) -> Future[T]:
    """Do ``action`` in a daemon thread of its own: if it never ends, it does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  the caller of `result` gets it
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


@contextmanager
def own_children() -> Iterator[Callable[[], None]]:
    """A function that kills the processes that ``multiprocessing`` has started inside the block, even busy ones."""
    before = set(multiprocessing.active_children())

    def kill() -> None:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()

    yield kill
