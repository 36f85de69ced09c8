"""``trace.json``: who did what when, as Chrome trace events, which Perfetto shows as rows of boxes.

The file is a JSON array whose closing bracket the format allows to be missing. It is written event by event, a line
each, so a killed run leaves one that opens, and a resumed run goes on in it. Times are microseconds of the wall clock.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlxf.core.clock import Span
from rlxf.core.disk import writing
from rlxf.core.errors import DataError, DiskError
from rlxf.core.kept_file import KeptFile

log = logging.getLogger(__name__)

NAME = "trace.json"
SHORTEST_S = 2e-5  # of a stage: an evaluation that is not due takes less
JOIN_S = 5e-3  # calls of a stage that follow each other so closely on a worker are one box
_PROCESSES = ("driver", "train", "infer", "ref", "reward")
_THREADS = 100_000  # so many rows of a process have numbers of their own
_WORKER = re.compile(r"(train|infer|ref|reward) rank (\d+)")
_TAIL = 2**16  # bytes: more than the last line of a file


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the picture; its numbers are the same in every process of a run."""

    process: str
    thread: str
    number: int  # in its process, 0 is the first

    @property
    def ids(self) -> dict[str, int]:
        process = 1 + _PROCESSES.index(self.process)
        return {"pid": process, "tid": process * _THREADS + self.number}


class Trace:
    """Writes the boxes of a run's stages and of its workers' calls.

    While the disk is full, boxes wait in memory. If too many wait, the file ends with a warning, and the run goes on.

    Args:
        path: of the file.
        append: go on in the file that is there, instead of a new one.
        role_rows: the roles are in this process: a stage is a box of each role that was at work, too.
    """

    def __init__(self, path: Path, *, append: bool = False, role_rows: bool = False) -> None:
        self._path = path
        self._role_rows = role_rows
        self._lock = threading.Lock()
        self._offset_s = time.time() - time.perf_counter()  # once: within a process the times never go back
        self._named = set[_Row]()
        self._ends: dict[_Row, int] = {}  # microseconds
        self._open: dict[_Row, Span] = {}  # the newest box of a worker, which the next call may make longer
        with writing(path, "hydra.run.dir"):
            size, separator = self._end() if append and path.exists() else (0, b"[\n")
        self._file: KeptFile | None = KeptFile(path, size=size)
        self._put(separator)

    def stage(self, span: Span, roles: Sequence[str]) -> None:
        thread = threading.current_thread()
        lane = None if thread is threading.main_thread() else thread.name
        with self._lock:
            for row, box in list(self._open.items()):
                if (box.stage, box.step) == (span.stage, span.step):  # its calls have ended with it
                    self._write(row, self._open.pop(row))
            if span.end - span.begin >= SHORTEST_S:
                self._write(_driver_row(lane), span)
                for role in roles if self._role_rows else ():
                    self._write(_Row(role, f"{role} rank 0", 0), span)

    def call(self, worker: str, span: Span) -> None:
        match = _WORKER.match(worker)
        if match is None:
            return
        row = _Row(match[1], match[0], int(match[2]))
        with self._lock:
            box = self._open.get(row)
            if box is not None and _is_next(box, span):
                self._open[row] = replace(box, end=max(box.end, span.end))
                return
            if box is not None:
                self._write(row, box)
            self._open[row] = span

    def close(self) -> None:
        """Write what is left; may be called twice."""
        with self._lock:
            for row, box in self._open.items():
                self._write(row, box)
            self._open.clear()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _end(self) -> tuple[int, bytes]:
        """Bytes after which events go on, and what comes between.

        That is behind the last whole line, without a bracket that somebody closed the array with.

        Raises:
            DataError: the file holds something else.
        """
        with self._path.open("rb") as file:
            start = file.read(2)
            if not b"[\n".startswith(start):
                raise DataError(
                    f"{self._path}: is no trace of a run, so the run cannot continue this file; move it away"
                )
            before = file.seek(max(0, file.seek(0, 2) - _TAIL))
            tail = file.read()
        kept = tail[: tail.rfind(b"\n") + 1].rstrip().removesuffix(b"]").rstrip()
        return before + len(kept), {b"": b"[\n", b"[": b"\n", b",": b"\n"}.get(kept[-1:], b",\n")

    def _write(self, row: _Row, span: Span) -> None:
        ids = row.ids
        if row not in self._named:
            self._named.add(row)
            process = {"ph": "M", "pid": ids["pid"]}
            self._event({**process, "name": "process_name", "args": {"name": row.process}})
            self._event({**process, "name": "process_sort_index", "args": {"sort_index": ids["pid"]}})
            self._event({"ph": "M", **ids, "name": "thread_name", "args": {"name": row.thread}})
            self._event({"ph": "M", **ids, "name": "thread_sort_index", "args": {"sort_index": row.number}})
        # A call waits in its worker's queue until the one before has ended, and boxes of a row must not overlap.
        begin = max(self._microseconds(span.begin), self._ends.get(row, 0))
        end = max(self._microseconds(span.end), begin)
        self._ends[row] = end
        args = {"step": span.step} | ({} if span.version is None else {"version": span.version})
        self._event({"ph": "X", **ids, "name": span.stage, "ts": begin, "dur": end - begin, "args": args})

    def _microseconds(self, seconds: float) -> int:
        return round((seconds + self._offset_s) * 1e6)

    def _event(self, event: dict[str, Any]) -> None:
        self._put(json.dumps(event, separators=(",", ":")).encode() + b",\n")

    def _put(self, line: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line)
        except DiskError as error:
            log.warning("%s; the run goes on without it", error)
            self._file.close()
            self._file = None


def _driver_row(lane: str | None) -> _Row:
    """The driver's, or that of its thread which waits for a role."""
    if lane is None or lane not in _PROCESSES[1:]:
        return _Row("driver", "driver", 0)
    return _Row("driver", f"driver, waits for {lane}", _PROCESSES.index(lane))


def _is_next(box: Span, span: Span) -> bool:
    same = (box.stage, box.step, box.version) == (span.stage, span.step, span.version)
    return same and span.begin - box.end < JOIN_S
