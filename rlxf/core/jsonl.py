"""JSON-lines files: byte offsets instead of rows in memory, and reports that name file, line and reason."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rlxf.core.disk import writing
from rlxf.core.errors import DataError
from rlxf.core.kept_file import KeptFile

if TYPE_CHECKING:
    from rlxf.core.types import Metrics

Row = dict[str, Any]
Check = Callable[[Row], str | None]  # what is wrong with a row, or None

MAX_LINE_BYTES = 4 * 2**20
MAX_SHOWN = 10
_BOM = b"\xef\xbb\xbf"
_STEP = re.compile(rb'\{"step": ?(\d+)[,}]')


class RowProblems:
    """What is wrong with the rows of one or more files. The report shows the first ten and the number of all.

    ``allowed``: this many wrong rows are left out instead of ending the run; ``key``: the recipe's key for this number.
    """

    def __init__(self, allowed: int = 0, key: str | None = None) -> None:
        self.allowed = allowed
        self.total = 0
        self._key = key
        self._shown: list[str] = []
        self._num_rows = 0

    def add(self, place: str, reason: str) -> bool:
        """Note a wrong row; whether it may be left out."""
        self.total += 1
        if len(self._shown) < MAX_SHOWN:
            self._shown.append(f"{place}: {reason}")
        return self.total <= self.allowed

    def raise_any(self, num_rows: int) -> None:
        """Raise one DataError when there are more than allowed. ``num_rows``: those of the file just read."""
        self._num_rows += num_rows
        if self.total <= self.allowed:
            return
        some = self._key and self.total < self._num_rows  # if all rows are wrong, it is not a file of such rows
        hint = f"; {self._key}={self.total} leaves such rows out" if some else ""
        *lines, last = self.report()
        raise DataError(*lines, last + hint)

    def report(self) -> list[str]:
        """One line for each of the first ten, and one that counts the rest."""
        hidden = self.total - len(self._shown)
        more = [f"... and {hidden} more: {self.total} of {self._num_rows} rows are wrong"] if hidden else []
        return [*self._shown, *more]


class JsonLines:
    """The rows of a file with one JSON object per line, read from disk on request.

    Every row is parsed and checked once, at the start; what stays in memory is 12 bytes per row. A byte-order mark,
    CRLF and blank lines are accepted. Wrong rows that ``problems`` allows keep their number and stand in ``bad``.
    """

    def __init__(self, path: str | Path, check: Check, problems: RowProblems | None = None) -> None:
        self.path = require_file(path)
        self.columns: tuple[str, ...] = ()  # every key that some row has, in order of appearance
        self.bad: dict[int, str] = {}  # wrong rows, which are left out, and what is wrong with them
        self.num_blank = 0  # blank lines skipped
        self._offsets = array("q")
        self._lines = array("i")
        self._index(check, RowProblems() if problems is None else problems)

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        return f"{self.path}:{self._lines[row]}"

    def __getitem__(self, row: int) -> Row:
        with self.path.open("rb") as handle:
            handle.seek(self._offsets[row])
            parsed = _parse(handle.readline(MAX_LINE_BYTES))
        if isinstance(parsed, str):
            raise DataError(f"{self.where(row)}: the file changed while the run was reading it: {parsed}")
        return parsed

    def _index(self, check: Check, problems: RowProblems) -> None:
        columns = dict[str, None]()
        with self.path.open("rb") as handle:
            if handle.read(3) != _BOM:
                handle.seek(0)
            offset, number = handle.tell(), 0
            while line := handle.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"{self.path}:{number}"
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _skip_line(handle)
                    parsed: Row | str = f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; split the row"
                elif not line.strip():
                    self.num_blank += 1
                    offset += len(line)
                    continue
                else:
                    if not len(self) and line.lstrip().startswith(b"["):
                        raise DataError(f"{place}: the file is one JSON list; write one object per line: jq -c '.[]'")
                    parsed = _parse(line)
                reason = parsed if isinstance(parsed, str) else check(parsed)
                if reason and problems.add(place, reason):
                    self.bad[len(self)] = reason
                if isinstance(parsed, dict):
                    columns.update(dict.fromkeys(parsed))
                self._offsets.append(offset)
                self._lines.append(number)
                offset = handle.tell()
        self.columns = tuple(columns)
        problems.raise_any(len(self))
        if not len(self):
            raise DataError(f"{self.path}: holds no rows; expected one JSON object per line")


def open_after(path: Path, step: int | None, unwritten: bytes = b"") -> KeptFile:
    """Open a file of rows that begin with their ``step``, to append. Keeps the rows up to ``step``; none if it is None.

    Later rows are cut off, and so is the half row of a killed run.

    Args:
        path: its folder is made.
        step: the last one that stays.
        unwritten: rows that the disk did not take when the checkpoint of ``step`` was written. They are written now if
            the file is there: a run that continues in another folder begins with the next step.

    Raises:
        DataError: the file holds other rows.
        DiskError: the file cannot be opened.
    """
    with writing(path, "hydra.run.dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if step is None or not path.exists():
        return KeptFile(path, size=0)
    rows = [(found, line) for line in unwritten.splitlines(keepends=True) if (found := _step_of(line)) is not None]
    before = min([step, *(found - 1 for found, _ in rows)])  # a killed run may have written some of them later
    file = KeptFile(path, size=_bytes_up_to(path, before))
    if missing := b"".join(line for found, line in rows if found <= step):
        file.write(missing)
    return file


def _step_of(line: bytes) -> int | None:
    match = _STEP.match(line)
    return int(match.group(1)) if match else None


def _bytes_up_to(path: Path, step: int) -> int:
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            found = _step_of(line)
            if found is None and line.endswith(b"\n"):
                raise DataError(
                    f"{path}:{number}: the line has no step, so the run cannot continue this file; move it away"
                )
            if found is None or found > step or not line.endswith(b"\n"):
                break
            size += len(line)
    return size


def require_file(path: str | Path) -> Path:
    """The path, if it is a regular file that can be read."""
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file}: is a folder; expected a file")
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        file.open("rb").close()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    return file


def _parse(line: bytes) -> Row | str:
    """The object on a line, or what is wrong with it."""
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}; expected one object per line"
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or nesting without end
        return f"not JSON that can be read: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object, got {describe(value)}; one object per line, no list around them"
    return value


def _skip_line(handle: BinaryIO) -> None:
    while chunk := handle.readline(2**20):
        if chunk.endswith(b"\n"):
            return


def describe(value: Any) -> str:
    """A JSON value in a message: its kind, and the value where it is short."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    text = repr(value)
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{kind} ({text})" if len(text) <= 40 else kind


def from_json(values: Mapping[str, float | None]) -> Metrics:
    """Metrics that were written with ``finite_or_null``; null is NaN again."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def finite_or_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has neither NaN nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def plain(value: Any) -> Any:
    """A logged value as JSON can hold it: what is neither text nor a finite number is written as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)
