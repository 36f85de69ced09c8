"""Reads a run folder: of a run that goes on, has ended, was killed, or was made by an older revision.

Nothing but files is read, no file is required but one of ``MARKS``, and what cannot be read is left out and noted.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlxf.core.command import TYPED
from rlxf.core.errors import ConfigError
from rlxf.core.events import NAME as EVENTS
from rlxf.report.rows import Columns, GrowingFile, Row, parse, step_of

MARKS = ("config.yaml", "metrics.jsonl", "run.jsonl", "summary.json", "eval.jsonl")  # any of them marks a run folder
JOURNAL = "run.jsonl"
MAX_EVENTS = 1000  # rows of events.jsonl and run.jsonl that are kept, the newest
_STEP = re.compile(rb'\{"step": ?(\d+)[,}]')
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SampleIndex:
    """Where the rows of ``samples.jsonl`` stand: 16 bytes a row, as texts with all their tokens are long."""

    def __init__(self, file: GrowingFile) -> None:
        self._file = file
        self._places = array("q")
        self.steps = array("q")
        self.generation = 0  # counts how often rows were taken away

    def __len__(self) -> int:
        return len(self._places)

    def update(self) -> None:
        """Take up what is new in the file."""
        if self._file.changed():
            self._cut(0)
        for place, line in self._file.lines():
            match = _STEP.match(line)
            step = int(match[1]) if match else step_of(parse(line) or {})
            if step is None:
                continue
            if self.steps and step < self.steps[-1]:  # the run went back to that step
                self._cut(bisect_left(self.steps, step))
            self._places.append(place)
            self.steps.append(step)

    def row(self, index: int) -> Row | None:
        """One pair, read from the file; None if that is not possible now."""
        return parse(self._file.line_at(self._places[index]))

    def _cut(self, rows: int) -> None:
        self.generation += 1
        del self.steps[rows:]
        del self._places[rows:]


@dataclass(slots=True)
class RunData:
    """What the files of a run say. It belongs to its reader, which adds to it at every look."""

    folder: Path
    samples: SampleIndex
    evaluated: GrowingFile  # eval.jsonl
    config: Mapping[str, Any] = field(default_factory=dict)
    command: Mapping[str, Any] = field(default_factory=dict)  # command.json
    summary: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    metrics: Columns = field(default_factory=Columns)
    evaluations: Columns = field(default_factory=Columns)
    answered: list[tuple[int, int]] = field(default_factory=list)  # step and place of the evaluations with answers
    events: list[Row] = field(default_factory=list)  # faults and recoveries
    journal: list[Row] = field(default_factory=list)  # started, checkpoint, verdict, ended
    unread: dict[str, int] = field(default_factory=dict)  # lines that hold no row, by file
    changed_at: float = 0.0  # newest change of its files, seconds since 1970

    @property
    def step(self) -> int:
        """Complete steps."""
        return max((columns.steps[-1] for columns in (self.metrics, self.evaluations) if len(columns)), default=0)


class RunReader:
    """Reads a run folder again and again, each time only what is new."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if it is no run folder."""
        require_run(folder)
        files = ("metrics.jsonl", "eval.jsonl", EVENTS, JOURNAL)
        self._files = {name: GrowingFile(folder / name) for name in files}
        self._small: dict[str, tuple[tuple[int, int], Mapping[str, Any]]] = {}
        samples = SampleIndex(GrowingFile(folder / "samples.jsonl"))
        self.run = RunData(folder=folder, samples=samples, evaluated=self._files["eval.jsonl"])

    def read(self) -> RunData:
        """The run as its files are now; the same object at every call."""
        run = self.run
        run.config = self._read_small("config.yaml", _yaml)
        run.command = self._read_small(TYPED, _json)
        run.summary = self._read_small("summary.json", _json)
        run.plan = self._read_small("plan.json", _json)
        self._read_metrics()
        self._read_evaluations()
        self._read_events(EVENTS, run.events)
        self._read_events(JOURNAL, run.journal)
        if not self._files["eval.jsonl"].path.exists():
            run.evaluations = _evaluations_in(run.metrics)
        run.samples.update()
        run.changed_at = newest_change(run.folder)
        return run

    def _read_metrics(self) -> None:
        if self._files["metrics.jsonl"].changed():
            self.run.metrics.clear()
        for _, row in self._rows("metrics.jsonl"):
            if (step := step_of(row)) is not None:
                self.run.metrics.add(step, row)

    def _read_evaluations(self) -> None:
        run = self.run
        if self._files["eval.jsonl"].changed():
            run.evaluations.clear()
            run.answered.clear()
        for place, row in self._rows("eval.jsonl"):
            if (step := step_of(row)) is None:
                continue
            run.evaluations.add(step, row)
            while run.answered and run.answered[-1][0] >= step:
                run.answered.pop()
            if isinstance(row.get("answers"), list):
                run.answered.append((step, place))

    def _read_events(self, name: str, rows: list[Row]) -> None:
        if self._files[name].changed():
            rows.clear()
        rows += [row for _, row in self._rows(name)]
        del rows[:-MAX_EVENTS]

    def _rows(self, name: str) -> Iterator[tuple[int, Row]]:
        for place, line in self._files[name].lines():
            row = parse(line)
            if row is not None:
                yield place, row
            elif line.strip():
                self.run.unread[name] = self.run.unread.get(name, 0) + 1

    def _read_small(self, name: str, load: Callable[[str], Any]) -> Mapping[str, Any]:
        """A small file; as it was when it cannot be read now, empty when it is not there."""
        path = self.run.folder / name
        earlier = self._small.get(name)
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if earlier is not None and earlier[0] == stamp:
                return earlier[1]
            content = load(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return {}
        except (ValueError, yaml.YAMLError):
            self.run.unread[name] = 1
            return earlier[1] if earlier else {}
        self._small[name] = (stamp, content if isinstance(content, dict) else {})
        return self._small[name][1]


def _evaluations_in(metrics: Columns) -> Columns:
    """The evaluations that stand in the rows of steps, of runs that wrote no file of their own for them."""
    found = Columns()
    names = [name for name in metrics.values if name.startswith("eval/")]
    for index, step in enumerate(metrics.steps):
        row = {name: value for name in names if (value := metrics.values[name][index]) == value}
        if row:
            found.add(step, row)
    return found


def read_run(folder: Path) -> RunData:
    """What the files of a run say now.

    Raises:
        ConfigError: it is no run folder.
    """
    return RunReader(folder).read()


def require_run(folder: Path) -> None:
    """Check that a folder is one of a run.

    Raises:
        ConfigError: it does not exist, or holds none of the files of a run.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder}: {what}; expected the folder of a run, such as outputs/RECIPE/DATE_TIME")
    if not any((folder / name).is_file() for name in MARKS):
        inside = sorted({path.parent for name in MARKS[:2] for path in folder.glob(f"*/{name}")})
        inside = inside or sorted({path.parent for path in folder.glob("*/*/metrics.jsonl")})
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise ConfigError(f"{folder}: is not the folder of a run: it holds none of {', '.join(MARKS)}{hint}")


def watched_files(folder: Path) -> list[Path]:
    """The files that a page is made of."""
    names = ("config.yaml", TYPED, "summary.json", "plan.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl")
    return [folder / name for name in (*names, EVENTS, JOURNAL)]


def newest_change(folder: Path) -> float:
    """When one of the files was changed last, seconds since 1970; 0 if there is none."""
    times = [0.0]
    for path in watched_files(folder):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a safe loader, in C where it is there


def _json(text: str) -> Any:
    return json.loads(text)
