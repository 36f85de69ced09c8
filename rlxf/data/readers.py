"""Rows of a data file, by suffix: JSON lines through byte offsets, Parquet through row groups."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlxf.errors import DataError
from rlxf.jsonl import Check, JsonLines, Problems, Row, require_file

if TYPE_CHECKING:
    import pyarrow

CACHE_BYTES = 256 * 2**20  # decoded row groups that a Parquet file keeps
_SCAN_ROWS = 1024  # rows decoded at a time while checking


class RowFile(Protocol):
    """A data file whose rows were all checked and are read on request."""

    path: Path
    columns: tuple[str, ...]  # every key that some row has

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...

    def where(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        ...


def open_rows(path: str | Path, check: Check) -> RowFile:
    """The rows of a ``.jsonl``, ``.json`` (one object per line) or ``.parquet`` file, each passed through ``check``.

    Raises:
        DataError: no such file, another suffix, or rows that are wrong; all of them in one report.
    """
    file = require_file(path)
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return JsonLines(file, check)
    if suffix == ".parquet":
        return ParquetRows(file, check)
    raise DataError(f"{file}: cannot read {suffix or 'a file without suffix'}; known: .jsonl, .json, .parquet")


class ParquetRows:
    """The rows of a Parquet file; whole row groups are decoded when asked for and the latest ones are kept."""

    def __init__(self, path: Path, check: Check) -> None:
        import pyarrow.parquet

        self.path = path
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
        self.columns: tuple[str, ...] = tuple(metadata.schema.to_arrow_schema().names)
        self._starts = [0]  # first row of each row group, and the number of rows
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._check_rows(check)

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"

    def __getitem__(self, row: int) -> Row:
        group = bisect_right(self._starts, row) - 1
        rows: list[Row] = self._group(group).slice(row - self._starts[group], 1).to_pylist()
        return rows[0]

    def _group(self, group: int) -> pyarrow.Table:
        import pyarrow.parquet

        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        with pyarrow.parquet.ParquetFile(self.path) as file:
            table = file.read_row_group(group, use_threads=False)
        self._cache[group] = table
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table

    def _check_rows(self, check: Check) -> None:
        import pyarrow.parquet

        problems, row = Problems(), 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_SCAN_ROWS, use_threads=False):
                    for parsed in _decode(batch):
                        reason = parsed if isinstance(parsed, str) else check(parsed)
                        if reason:
                            problems.add(self.where(row), reason)
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: damaged after row {row}: {error}") from error
        problems.raise_any(len(self))
        if not len(self):
            raise DataError(f"{self.path}: holds no rows")


def _decode(batch: Any) -> list[Row | str]:
    """The rows of an Arrow batch, or what is wrong with them."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_decode_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _decode_row(batch: Any) -> Row | str:
    try:
        row: Row = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    return row
