"""Ctrl-C and SIGTERM: the first ends the run with a checkpoint, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlxf.core.errors import StopRequested

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 30.0  # default of training.stop_grace_s
LEAVE_S = 6.0  # how long the second signal waits for the clean-up


class Stop:
    """The user's wish to end the run, asked between stages and by every wait.

    Args:
        grace_s: how long the first signal lets a stage finish that must not be cut (an update, a sync), seconds. It
            limits the stage only: the checkpoint that follows takes as long as it takes.
        interrupt: raise out of every interruptible stage at once, since all of them run in this process. Without it
            whoever waits for remote stages asks ``must_give_up``.
        clean_up: run after the second signal, before the process leaves.
        leave: ends the process; ``os._exit`` but for tests.
    """

    def __init__(
        self,
        *,
        grace_s: float = GRACE_S,
        interrupt: bool = False,
        clean_up: Callable[[], None] = lambda: None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.clean_up = clean_up
        self.grace_s = grace_s
        self._interrupt = interrupt
        self._leave = leave
        self._signals: tuple[signal.Signals, ...] = SIGNALS
        self._signal: int | None = None
        self._requested_at = 0.0
        self._here = threading.local()  # each thread has work of its own that can be dropped or not
        self._depth_here = 0  # of interruptible stages that run in this process
        self._patience = 0
        self._background = 0  # rises when nobody waits any more for the threads of background work

    @property
    def requested(self) -> bool:
        return self._signal is not None

    def check(self) -> None:
        """Raise StopRequested when a signal came; called where nothing is half done."""
        if self.requested:
            raise self.error("stopped")

    @contextmanager
    def interruptible(self, *, here: bool = False) -> Iterator[None]:
        """Work that can be dropped without a trace: sampling, scoring, loading; never an update, sync or checkpoint.

        Args:
            here: it runs in this process, so a signal raises out of it at once.
        """
        here = here or self._interrupt
        self._here.depth = self._depth + 1
        self._depth_here += here
        try:
            self.check()
            yield
        finally:
            self._here.depth = self._depth - 1
            self._depth_here -= here

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Work that the first signal waits for, however long it takes: a checkpoint. The second one still ends it."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1

    @property
    def _depth(self) -> int:
        """Of interruptible stages in this thread."""
        depth: int = getattr(self._here, "depth", 0)
        return depth

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Work in a thread of its own, which gives up its waits once ``leave_background`` is called."""
        self._here.background = self._background
        yield

    def leave_background(self) -> None:
        """What is under way in the background is not needed any more; what begins from now on is."""
        self._background += 1

    def must_give_up(self) -> bool:
        """Whether a wait has to give up: at once for interruptible work, after a grace period for the rest."""
        if getattr(self._here, "background", self._background) != self._background:
            return True
        return self.requested and (self._depth > 0 or self.grace_expired())

    def grace_expired(self) -> bool:
        """Whether the stage that must not be cut took longer than the grace period."""
        return self.requested and not self._patience and time.monotonic() - self._requested_at > self.grace_s

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + (self._signal or signal.SIGTERM)

    def error(self, what: str) -> StopRequested:
        number = self._signal or signal.SIGTERM
        error = StopRequested(f"{what} by {signal.Signals(number).name}")
        error.exit_code = self.exit_code
        return error

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over both signals inside, unless one is ignored; the previous handlers come back afterwards."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        # A job in the background (`nohup ... &`) is started with SIGINT ignored, and a Ctrl-C is not meant for it.
        self._signals = tuple(number for number in SIGNALS if previous[number] is not signal.SIG_IGN)
        self.install()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Take over both signals; again after a library has installed handlers of its own."""
        for number in self._signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            self._leave_now(128 + number)
            return
        self._signal = number
        self._requested_at = time.monotonic()
        if self._depth_here > 0:
            raise self.error("stopped")

    def _leave_now(self, code: int) -> None:
        # In a thread, because a signal can arrive in the middle of the very call that the clean-up has to make.
        cleaner = threading.Thread(target=self.clean_up, daemon=True)
        cleaner.start()
        cleaner.join(LEAVE_S)
        self._leave(code)
