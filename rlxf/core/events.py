"""Faults and recoveries: a line for people, which is also a row of ``events.jsonl`` in the run folder.

Whoever notices one logs it with ``extra=event(...)``. The file has rows only of what went wrong, so an undisturbed run
has no such file. Its rows are never cut: they tell what happened, also to steps that were done again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlxf.core.errors import RlxfError, RunInterrupted, WorkerLost
from rlxf.core.files import WholeLines

NAME = "events.jsonl"
_FAULTS = (RlxfError.exit_code, RunInterrupted.exit_code)  # not a wrong recipe, and not a signal
_KEY = "rlxf_event"


def event(
    what: str,
    *,
    who: str | None = None,
    phase: str | None = None,
    step: int | None = None,
    seconds: float | None = None,
    steps_lost: int | None = None,
) -> dict[str, Any]:
    """The ``extra`` argument of a logging call whose line is an event.

    Args:
        what: a word: ``lost``, ``gone``, ``hung``, ``recovered``, ``rebuilt``, ``node lost``; ``memory`` will run out.
        who: the worker, node or file.
        phase: what it was doing.
        step: driver step that was under way; 1 is the first.
        seconds: how long it took.
        steps_lost: complete driver steps that are done again.
    """
    row = {"event": what, "who": who, "phase": phase, "step": step, "seconds": seconds, "steps_lost": steps_lost}
    return {_KEY: {key: value for key, value in row.items() if value is not None}}


class EventLog(logging.Handler):
    """Appends a row for each event."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._lines = WholeLines(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the row of an event; other lines of the log are none."""
        found: dict[str, Any] | None = getattr(record, _KEY, None)
        if found is not None:
            self._write(record.created, found, record.getMessage())

    def end(self, error: RlxfError) -> None:
        """Write the row of the error that ends the run."""
        stage = error.stage if isinstance(error, WorkerLost) else None
        step = None if error.complete_steps is None else error.complete_steps + 1
        found = {"event": "ended", "phase": stage, "step": step, "exit_code": error.exit_code}
        row = {key: value for key, value in found.items() if value is not None}
        self._write(datetime.now(UTC).timestamp(), row, str(error))

    def _write(self, at: float, row: dict[str, Any], message: str) -> None:
        when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        seconds = {"seconds": round(row["seconds"], 3)} if "seconds" in row else {}
        line = json.dumps({"time": when, **row, **seconds, "message": message}, ensure_ascii=False)
        self._lines.add(line)


@contextmanager
def recorded_events(run_dir: Path) -> Iterator[None]:
    """Inside, every event of the program is a row of the run's file."""
    handler, logger = EventLog(run_dir / NAME), logging.getLogger()
    logger.addHandler(handler)
    try:
        yield
    except RlxfError as error:
        if error.exit_code in _FAULTS:
            handler.end(error)
        raise
    finally:
        logger.removeHandler(handler)
