"""Rows of Parquet and Arrow files, of which only the batches in use are in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.core.errors import DataError
from rlxf.core.jsonl import Check, Row, RowProblems

if TYPE_CHECKING:
    import pyarrow

CACHE_BYTES = 256 * 2**20  # decoded batches that a file keeps
_SCAN_ROWS = 1024  # rows decoded at a time while checking


class _BatchedRows:
    """Rows in batches that are decoded when asked for; the latest ones are kept."""

    path: Path
    columns: tuple[str, ...]

    def __init__(self, check: Check, problems: RowProblems) -> None:
        self.bad: dict[int, str] = {}  # wrong rows, which are left out, and what is wrong with them
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._starts = [0]  # first row of each batch, and the number of rows
        for size in self._sizes():
            self._starts.append(self._starts[-1] + size)
        self._check_rows(check, problems)

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"

    def __getitem__(self, row: int) -> Row:
        number = bisect_right(self._starts, row) - 1
        rows: list[Row] = self._batch(number).slice(row - self._starts[number], 1).to_pylist()
        return rows[0]

    def _batch(self, number: int) -> Any:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        self._cache[number] = batch = self._decode_batch(number)
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return batch

    def _sizes(self) -> Iterator[int]:
        """Rows of each batch."""
        raise NotImplementedError

    def _decode_batch(self, number: int) -> Any:
        raise NotImplementedError

    def _scan(self) -> Iterator[Any]:
        """All rows in file order, in small batches."""
        raise NotImplementedError

    def _check_rows(self, check: Check, problems: RowProblems) -> None:
        import pyarrow

        row = 0
        try:
            for batch in self._scan():
                for parsed in _decode(batch):
                    reason = parsed if isinstance(parsed, str) else check(parsed)
                    if reason and problems.add(self.where(row), reason):
                        self.bad[row] = reason
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: damaged after row {row}: {error}") from error
        problems.raise_any(len(self))
        if not len(self):
            raise DataError(f"{self.path}: holds no rows")


class ParquetRows(_BatchedRows):
    """The rows of a Parquet file; a batch is a row group."""

    def __init__(self, path: Path, check: Check, problems: RowProblems) -> None:
        import pyarrow.parquet

        self.path = path
        try:
            self._metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
        self.columns = tuple(self._metadata.schema.to_arrow_schema().names)
        super().__init__(check, problems)

    def _sizes(self) -> Iterator[int]:
        return (self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups))

    def _decode_batch(self, number: int) -> Any:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            return file.read_row_group(number, use_threads=False)

    def _scan(self) -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=_SCAN_ROWS, use_threads=False)


class ArrowRows(_BatchedRows):
    """The rows of an Arrow IPC file or stream, mapped into memory: the system keeps what is read often."""

    def __init__(self, path: Path, check: Check, problems: RowProblems) -> None:
        import pyarrow.ipc

        self.path = path
        try:
            source = pyarrow.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader: Any = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
            self._file = reader if is_file else None
            self._stream = [] if is_file else list(reader)  # views of the mapped file
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not an Arrow file that can be read: {error}") from error
        self.columns = tuple(reader.schema.names)
        super().__init__(check, problems)

    def _sizes(self) -> Iterator[int]:
        if self._file is None:
            return (batch.num_rows for batch in self._stream)
        return (self._file.get_batch(number).num_rows for number in range(self._file.num_record_batches))

    def _decode_batch(self, number: int) -> Any:
        return self._stream[number] if self._file is None else self._file.get_batch(number)

    def _scan(self) -> Iterator[Any]:
        for number in range(len(self._starts) - 1):
            batch = self._decode_batch(number)
            yield from (batch.slice(start, _SCAN_ROWS) for start in range(0, batch.num_rows, _SCAN_ROWS))


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
