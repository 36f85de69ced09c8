"""Megatron's indexed token files: ``<prefix>_packed_<key>_document.bin`` and ``.idx``, one pair per key, int32.

The only place of the data room that knows megatron: its builder writes the files, its dataset maps them into memory.
"""

from __future__ import annotations

import os
import re
import struct
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from rlxf.core.errors import DataError
from rlxf.core.files import fsync, replace_files
from rlxf.core.jsonl import Check, Row, RowProblems

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

_KEY = re.compile(r"(?P<prefix>.*)_packed_(?P<key>\w+?)_document\.idx")
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents (with the 0 before the first)
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_INT32 = 4
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # of megatron's dtype codes


class IndexedWriter:
    """Writes rows of token ids, one document per row, for every key of the row.

    A context manager: at its end all files get their names. After an exception there is no new file; older ones stay.
    """

    def __init__(self, names: Mapping[str, str | Path]) -> None:
        """``names``: for every key of the rows the path of its two files, without ``.bin`` and ``.idx``.

        Raises:
            DataError: the folder cannot be made or written to.
        """
        self.paths = {key: Path(name) for key, name in names.items()}
        self._mark = f".{uuid.uuid4().hex[:8]}.tmp"
        self._builders: dict[str, IndexedDatasetBuilder] = {}

    def __enter__(self) -> IndexedWriter:
        library = _megatron()
        try:
            for key, path in self.paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._builders[key] = library.IndexedDatasetBuilder(f"{path}{self._mark}.bin", dtype=np.int32)
        except OSError as error:
            self._discard()
            raise DataError(
                f"{path.parent}: cannot be written to: {error.strerror}; --output-prefix is a folder and the beginning "
                "of the names of its files"
            ) from error
        return self

    def add(self, row: Mapping[str, Sequence[int]]) -> None:
        """Append one row; -100 is a valid label."""
        for key, builder in self._builders.items():
            builder.add_document(np.asarray(row[key], dtype=np.int32), [len(row[key])])

    def append(self, key: str, path: str | Path) -> None:
        """Append all rows of the two files at ``path``, which is without suffix, to those of ``key``."""
        if check_index(Path(path)) != _INT32:
            raise DataError(f"{path}.idx: holds other numbers than int32; only files of int32 can be joined")
        self._builders[key].add_index(str(path))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        for key, builder in self._builders.items():
            builder.finalize(f"{self.paths[key]}{self._mark}.idx")
        paths = self.paths.values()
        renames = {Path(f"{path}{self._mark}{end}"): Path(f"{path}{end}") for end in (".bin", ".idx") for path in paths}
        for temporary in renames:
            fsync(temporary)
        for path in paths:  # a crash may leave data without index, never old index and new data
            Path(f"{path}.idx").unlink(missing_ok=True)
        replace_files(renames)

    def _discard(self) -> None:
        for key, builder in self._builders.items():
            builder.data_file.close()
            for suffix in (".bin", ".idx"):
                with suppress(OSError):
                    os.unlink(f"{self.paths[key]}{self._mark}{suffix}")


class IndexedRows:
    """Rows of token ids at a prefix, or at the only prefix of a folder: a `RowFile` of lists of ints."""

    def __init__(self, path: str | Path, check: Check | None = None, problems: RowProblems | None = None) -> None:
        """Rows that ``check`` finds wrong, as far as ``problems`` allows them, stand in ``bad``.

        Raises:
            DataError: nothing is there, several prefixes are, files are damaged or of different lengths, or wrong rows.
        """
        self.path, names = find_indexed(path)
        self.columns = tuple(sorted(names))
        self._sets = {key: open_indexed(names[key]) for key in self.columns}
        lengths = {key: len(rows) for key, rows in self._sets.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.path}: the files of one prefix must have as many rows each, but have {lengths}")
        self._length = next(iter(lengths.values()))
        if not self._length:
            raise DataError(f"{self.path}: holds no rows")
        self.bad: dict[int, str] = {}
        if check is not None:
            self._check(check, RowProblems() if problems is None else problems)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Row:
        return {key: rows[row].tolist() for key, rows in self._sets.items()}

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"

    def _check(self, check: Check, problems: RowProblems) -> None:
        for row in range(len(self)):
            reason = check(self[row])
            if reason and problems.add(self.where(row), reason):
                self.bad[row] = reason
        problems.raise_any(len(self))


def merge_indexed(folder: str | Path, keys: Sequence[str], prefix: str | Path) -> list[str]:
    """Join the indexed files in a folder: for each key, those whose names hold it, in the order of their names.

    Returns:
        The paths of the new files, ``<prefix>_<key>``, without ``.bin`` and ``.idx``.

    Raises:
        DataError: no such folder, no file for a key, damaged files, or files of other numbers than int32.
    """
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"{folder}: no such folder; --merge-group-keys joins the indexed files of the folder --input")
    stems = sorted(file.stem for file in place.glob("*.idx"))
    groups = {key: [place / stem for stem in stems if key in stem] for key in keys}
    for key, paths in groups.items():
        if not paths:
            has = ", ".join(stems[:8]) or "no .idx file at all"
            raise DataError(f"{folder}: no indexed file with {key!r} in its name; it holds {has}")
    names = {key: f"{prefix}_{key}" for key in keys}
    with IndexedWriter(names) as writer:
        for key, paths in groups.items():
            for path in paths:
                writer.append(key, path)
    return list(names.values())


def packed_name(prefix: str | Path, key: str) -> str:
    """The path of the two files that hold ``key`` of the rows at a prefix, without their suffix."""
    return f"{prefix}_packed_{key}_document"


def is_indexed(path: str | Path) -> bool:
    """Whether a data path is a prefix of indexed files, or a folder with such files."""
    return bool(_packed(Path(path)))


def find_indexed(path: str | Path) -> tuple[Path, dict[str, Path]]:
    """The prefix that a path means, and for every key the path of its files without suffix.

    Raises:
        DataError: there are none, or the path is a folder with the files of several prefixes.
    """
    found = _packed(Path(path))
    prefixes = sorted({prefix for prefix, _ in found})
    if not prefixes:
        raise DataError(f"{path}: no indexed files there; expected {packed_name(path, '<key>')}.bin and .idx")
    if len(prefixes) > 1:
        raise DataError(
            f"{path}: holds the files of several prefixes; give one of them: {', '.join(map(str, prefixes[:8]))}"
        )
    return prefixes[0], {key: Path(packed_name(prefix, key)) for prefix, key in found}


def _packed(path: Path) -> list[tuple[Path, str]]:
    """Prefix and key of every index file that belongs to a prefix or lies in a folder."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return []
    matches = [match for name in sorted(os.listdir(folder)) if (match := _KEY.fullmatch(name))]
    return [(folder / m["prefix"], m["key"]) for m in matches if path == folder or m["prefix"] == path.name]


def open_indexed(path: Path) -> IndexedDataset:
    """Megatron's own reader of the two files at a path, which is without suffix; they are checked first."""
    check_index(path)
    return _megatron().IndexedDataset(str(path))


def _megatron() -> Any:
    """Megatron's module, without the warnings of its import that Transformer Engine and Apex are missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def check_index(path: Path) -> int:
    """Check what megatron would only assert, or notice in the middle of a run.

    Returns:
        Megatron's code of the type of its numbers.

    Raises:
        DataError: a file is missing, the index is of another format, or one of the two is cut off.
    """
    index, data = Path(f"{path}.idx"), Path(f"{path}.bin")
    for file in (index, data):
        if not file.is_file():
            raise DataError(f"{file}: no such file; the two files of a key belong together")
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise DataError(f"{index}: not an index file of Megatron; make it with scripts/preprocess_data.py")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION or code not in _ITEM_BYTES:
            raise DataError(f"{index}: version {version} with number type {code}; known is version {_VERSION}")
        lengths = np.fromfile(stream, dtype=np.int32, count=sequences)
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if index.stat().st_size not in (expected, expected + sequences):  # with a mode per sequence: multimodal
        raise DataError(f"{index}: {index.stat().st_size} bytes, but its header promises {expected}; make it again")
    tokens = int(lengths.sum(dtype=np.int64)) * _ITEM_BYTES[code]
    if data.stat().st_size != tokens:
        raise DataError(f"{data}: {data.stat().st_size} bytes, but its index promises {tokens}; make them again")
    return int(code)
