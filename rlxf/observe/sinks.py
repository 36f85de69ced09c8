"""Where a step's numbers are written: files, and trackers of experiments (trackers.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from rlxf.core.jsonl import finite_or_null, open_after
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

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        """``after``: the step after which a resumed run goes on; its row and those before stay."""
        self._file = open_after(path, after)

    def write(self, step: int, metrics: Metrics) -> None:
        self._file.write((json.dumps({"step": step, **finite_or_null(metrics)}) + "\n").encode())
        self._file.flush()  # line by line: a killed run keeps what it wrote

    def close(self, *, complete: bool = False) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard event files. Imported late: TensorBoard takes a second to import."""

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        """``after``: the step after which a resumed run goes on; TensorBoard hides what is there of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, complete: bool = False) -> None:
        self._writer.close()
