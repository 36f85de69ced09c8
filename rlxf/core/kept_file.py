"""Files that grow while a run goes on. A disk that is full for a while costs no row, and doubles none."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlxf.core.disk import explain
from rlxf.core.errors import DiskError
from rlxf.core.events import event
from rlxf.core.files import append_whole

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20  # that wait to be written
AGAIN_S = 1.0  # between tries


class KeptFile:
    """Appends pieces, each whole or not at all. What the disk does not take waits in memory, before later pieces.

    The first failure is a warning, and so is what happens after it: the run goes on.

    Args:
        path: the file. It is made if it is not there; its folder is.
        size: bytes that stay; what is behind them is cut off.
        key: the recipe's key that names the file's folder, for messages.
        sync: every piece is on disk when ``write`` returns.
        now: seconds of a clock that only goes forward.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        key: str = "hydra.run.dir",
        sync: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._key, self._sync, self._now = key, sync, now
        self._size = size
        self._waiting: list[bytes] = []
        self._num_waiting = 0  # bytes
        self._began: float | None = None  # when the disk began to take nothing
        self._tried = 0.0  # the newest try since then
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, size)
        except OSError as error:
            self._close()
            raise DiskError(explain(error, path, key)) from error

    def write(self, piece: bytes) -> None:
        """Append a piece now, or when there is room.

        Raises:
            DiskError: too much waits to be written.
        """
        self._waiting.append(piece)
        self._num_waiting += len(piece)
        if self._began is None or self._now() - self._tried >= AGAIN_S:
            self.retry()
        if self._num_waiting > MOST_BYTES:
            raise DiskError(
                f"{self.path}: {self._num_waiting:,} bytes wait to be written; make room, or name a folder on another "
                f"disk in {self._key}"
            )

    @property
    def unwritten(self) -> bytes:
        """What waits, after another try."""
        self.retry()
        return b"".join(self._waiting)

    def flush(self) -> None:
        """Return when nothing waits.

        Raises:
            DiskError: the disk still takes nothing.
        """
        if (error := self.retry()) is not None:
            raise DiskError(explain(error, self.path, self._key))

    def close(self) -> None:
        """Write what waits, or tell that it is lost. May be called twice."""
        if self._file is None:
            return
        if self.retry() is not None:
            log.warning("%s: its last %d bytes could not be written", self.path, self._num_waiting)
        self._close()

    def retry(self) -> OSError | None:
        """Write what waits; why it could not."""
        if not self._waiting or self._file is None:
            return None
        try:
            append_whole(self._file, self._size, b"".join(self._waiting), sync=self._sync)
        except OSError as error:
            self._tried = self._now()
            if self._began is None:
                self._began = self._tried
                words = "%s. The run goes on; what belongs there is kept, and written when there is room"
                log.warning(words, explain(error, self.path, self._key), extra=event("disk", who=self.path.name))
            return error
        self._size += self._num_waiting
        self._waiting, self._num_waiting = [], 0
        if self._began is not None:
            seconds, self._began = self._now() - self._began, None
            found = event("disk is back", who=self.path.name, seconds=seconds)
            log.info("%s: written again after %.0f s; nothing of it is lost", self.path, seconds, extra=found)
        return None

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a network file system may tell of a full disk here: the rows before were told of
                os.close(self._file)
            self._file = None
