"""Where a step's numbers are written: files, and trackers of experiments (trackers.py)."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol

from rlxf.core.disk import writing
from rlxf.core.files import make_folder
from rlxf.core.jsonl import finite_or_null, open_after
from rlxf.core.kept_file import KeptFile
from rlxf.core.types import Metrics


class Sink(Protocol):
    """A place that metrics are written to."""

    def write(self, step: int, metrics: Metrics) -> None:
        """``step``: complete driver steps, 0 before the first."""
        ...

    def close(self, *, complete: bool = False) -> None:
        """``complete``: the run has come to its end. May be called twice."""
        ...


class JsonlSink:
    """One object per step, ``step`` first, numbers at full precision; what is not finite becomes null."""

    def __init__(self, path: Path, *, after: int | None = None, unwritten: bytes = b"") -> None:
        """``after``: the step after which a resumed run goes on; its row and those before stay.

        ``unwritten``: of those, the ones that the disk did not take.
        """
        self.file = open_after(path, after, unwritten)

    def write(self, step: int, metrics: Metrics, **more: Any) -> None:
        """Line by line: a killed run keeps what it wrote. ``more``: JSON data that are no metrics.

        ASCII only: programs that read the file by ``splitlines`` would split a text at U+2028 or U+0085.
        """
        self.file.write((json.dumps({"step": step, **finite_or_null(metrics), **more}) + "\n").encode())

    def close(self, *, complete: bool = False) -> None:
        self.file.close()


class TensorBoardSink:
    """A TensorBoard event file, an event a step. Imported late: TensorBoard takes a second to import."""

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        """``after``: the step after which a resumed run goes on; TensorBoard hides what is there of later steps.

        Raises:
            DiskError: the file cannot be opened.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self._record = Event, Summary, RecordWriter
        now = time.time_ns()
        with writing(folder, "hydra.run.dir"):
            make_folder(folder)
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._file = KeptFile(folder / name, size=0)
        self._add(file_version="brain.Event:2")
        if after is not None:
            self._add(step=after + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Metrics) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        record = io.BytesIO()
        self._record(record).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.write(record.getvalue())

    def close(self, *, complete: bool = False) -> None:
        self._file.close()
