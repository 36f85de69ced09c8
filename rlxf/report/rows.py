"""Files of JSON rows that grow, are cut and are replaced while somebody reads them."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_END_BYTES = 128  # of what was read already; a file that was cut and has grown again differs there
_CHUNK_BYTES = 2**20


class GrowingFile:
    """Lines that are added to a file, each given once. A file that was cut or replaced is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0  # behind the last whole line that was given
        self._inode = -1
        self._end = b""  # the bytes before the offset

    def changed(self) -> bool:
        """Whether what was given so far is void: the file is another one, or was cut. Then all is given again."""
        try:
            found = self.path.stat()
        except OSError:
            return self._restart() if self._offset else False
        if self._offset and (found.st_ino != self._inode or not self._same_end()):
            return self._restart()
        self._inode = found.st_ino
        return False

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Place in the file and content of every new whole line; half a line at the end is given once it is whole."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                place, self._offset = self._offset, self._offset + len(line)
                self._end = (self._end + line[-_END_BYTES:])[-_END_BYTES:]
                yield place, line

    def line_at(self, place: int) -> bytes:
        """The line that begins there; empty if the file cannot be read now."""
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                return file.readline()
        except OSError:
            return b""

    def _same_end(self) -> bool:
        """Whether what was read last is still there; it is not in a file that was cut, even if it has grown again."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._end))
                return file.read(len(self._end)) == self._end
        except OSError:
            return False

    def _restart(self) -> bool:
        self._offset, self._inode, self._end = 0, -1, b""
        return True


def parse(line: bytes) -> Row | None:
    """The object in a line; None if it holds none."""
    try:
        row = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) else None


def step_of(row: Mapping[str, Any]) -> int | None:
    """The complete steps that a row speaks of."""
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def number(value: object) -> float:
    """A finite number, else NaN."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


@dataclass(slots=True)
class Columns:
    """Rows of numbers in the order of their steps, 8 bytes a number; NaN where a row has none."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=dict)
    generation: int = 0  # counts how often rows were taken away

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Append a row. One of a step that is there begins the run again at that step: later ones go."""
        if self.steps and step <= self.steps[-1]:
            self._cut(bisect_left(self.steps, step))
        rows = len(self.steps)
        self.steps.append(step)
        for name, value in row.items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            if name not in self.values:
                self.values[name] = array("d", [math.nan]) * rows
            self.values[name].append(number(value))
        for column in self.values.values():
            if len(column) == rows:
                column.append(math.nan)

    def clear(self) -> None:
        self._cut(0)

    def row(self, index: int) -> dict[str, float]:
        """The numbers of one row, NaN left out."""
        found = {name: column[index] for name, column in self.values.items()}
        return {name: value for name, value in found.items() if value == value}

    def column(self, name: str) -> array[float]:
        """Of a metric; all NaN if no row has it."""
        found = self.values.get(name)
        return array("d", [math.nan]) * len(self) if found is None else found

    def first(self, name: str) -> float:
        """The first number of a metric, or NaN."""
        return next((value for value in self.column(name) if value == value), math.nan)

    def last(self, name: str) -> float:
        """The newest number of a metric, or NaN."""
        return next((value for value in reversed(self.column(name)) if value == value), math.nan)

    def _cut(self, rows: int) -> None:
        self.generation += 1
        del self.steps[rows:]
        for column in self.values.values():
            del column[rows:]
