"""Makes the file of one run or of several, once, or again and again while a run goes on."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from rlxf.core.disk import patient, writing
from rlxf.core.errors import DiskError
from rlxf.core.files import write_text
from rlxf.report.content import RunPage
from rlxf.report.page import make_page
from rlxf.report.read import RunReader, watched_files

NAME = "report.html"
LEAST_INTERVAL_S = 20.0
SHARE = 0.01  # of one core, at most
NICE = 19

Stamp = tuple[tuple[int, int], ...]


class Page:
    """The page of one or several run folders."""

    def __init__(self, folders: Sequence[Path], output: Path) -> None:
        """Raises ConfigError if one of them is no run folder."""
        self._output = output
        labels = _labels(folders)
        self._runs = [(RunPage(RunReader(folder)), label) for folder, label in zip(folders, labels, strict=True)]

    def write(self, *, alive: bool | None = None, follows: bool = False) -> None:
        """Replace the file in one step.

        Args:
            alive: whether the process of the run is there; None if that is not known.
            follows: the page is renewed while the run goes on.

        Raises:
            DiskError: the disk does not take it.
        """
        now = datetime.now(UTC)
        share = len(self._runs)
        runs = [run.content(now=now.timestamp(), alive=alive, share=share, label=label) for run, label in self._runs]
        text = make_page(runs, now=now, follows=follows)
        with writing(self._output, "--output"):
            write_text(self._output, text)


def follow(
    page: Page,
    folder: Path,
    ends: BinaryIO,
    *,
    interval_s: float = LEAST_INTERVAL_S,
    warn: Callable[[str], object] = sys.stderr.write,
) -> None:
    """Write the page now, again when files have changed, and a last time when ``ends`` is closed.

    A disk that does not take the page costs that page: it is tried again, like one whose files have changed.

    Args:
        page: of ``folder``.
        folder: of the run.
        ends: a pipe whose other end the run holds.
        interval_s: least seconds between two pages; more where a page takes more than ``SHARE`` of that.
        warn: takes a line that people should see.
    """
    written: Stamp | None = None
    pause, warned = 0.0, False
    while not _closed(ends, pause):
        if not folder.is_dir():
            return  # somebody has deleted the run
        stamp = _stamp(folder)
        if stamp == written:
            pause = min(interval_s, 1.0)
            continue
        began = time.process_time()
        try:
            page.write(alive=True, follows=True)
            written = stamp
        except DiskError as error:
            if not warned:
                warn(f"report: {error}; the page is tried again\n")
            warned = True
        pause = max(interval_s, (time.process_time() - began) / SHARE)
    if folder.is_dir():
        patient(lambda: page.write(alive=False))


def _closed(pipe: BinaryIO, seconds: float) -> bool:
    """Wait; whether the pipe was closed meanwhile. What comes through it is thrown away."""
    until = time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([pipe], [], [], max(until - time.monotonic(), 0.0))
        if not ready:
            return False
        if not os.read(pipe.fileno(), 4096):
            return True


def _stamp(folder: Path) -> Stamp:
    found = []
    for path in watched_files(folder):
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, -1))
    return tuple(found)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    if len(folders) == 1:
        return [""]
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index + 1}: {folder.name}" for index, folder in enumerate(folders)]
