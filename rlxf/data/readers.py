"""Rows of what a data path names: a file, a folder of files, or a Hugging Face dataset that was saved to disk."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol

from rlxf.core.errors import DataError
from rlxf.core.jsonl import Check, JsonLines, Row, RowProblems, require_file
from rlxf.data.arrow import ArrowRows, ParquetRows
from rlxf.data.indexed import IndexedRows, is_indexed
from rlxf.data.spans import CsvRows, JsonList

Part = Literal["train", "valid", "test"]


class RowFile(Protocol):
    """Rows that were all checked and are read on request."""

    path: Path
    columns: tuple[str, ...]  # every key that some row has
    bad: dict[int, str]  # wrong rows, which are left out, and what is wrong with them

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...

    def where(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        ...


def open_rows(path: str | Path, check: Check, problems: RowProblems | None = None, part: Part = "train") -> RowFile:
    """The rows of a data path, each passed through ``check``.

    Args:
        path: a file of one of the kinds in ``READERS``; a folder of such files, all of one kind, which are read in the
            order of their names; the folder that ``save_to_disk`` of a Hugging Face dataset wrote; a prefix of indexed
            files, or their folder.
        check: what is wrong with a row, or None.
        problems: collects wrong rows; one that allows some leaves them out and names them in ``bad``.
        part: which split of a Hugging Face ``DatasetDict``.

    Raises:
        DataError: no such file, an unknown kind, or more wrong rows than are allowed; all of them in one report.
    """
    place = Path(path)
    problems = RowProblems() if problems is None else problems
    if is_indexed(place):
        return IndexedRows(place, check, problems)
    if not place.is_dir():
        return _open_file(place, check, problems)
    if (place / _DATASET_DICT).is_file():
        place = place / _split_name(place, part)
    files = (_dataset_files if (place / _DATASET).is_file() else _files_of_one_kind)(place)
    opened = [_open_file(file, check, problems) for file in files]
    return opened[0] if len(opened) == 1 else Concatenated(place, opened)


def has_own_parts(path: str | Path) -> bool:
    """Whether a data path names a dataset that is cut into train and validation rows already."""
    return (Path(path) / _DATASET_DICT).is_file() and len(_split_names(Path(path))) > 1


class Concatenated:
    """The rows of several files, one file after the other."""

    def __init__(self, path: Path, files: Sequence[RowFile]) -> None:
        self.path = path
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for file in files for name in file.columns))
        self._files = files
        self._starts = [0, *accumulate(len(file) for file in files)]
        pairs = zip(self._starts, files, strict=False)
        self.bad = {start + row: reason for start, file in pairs for row, reason in file.bad.items()}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Row:
        file, inside = self._place(row)
        return file[inside]

    def where(self, row: int) -> str:
        file, inside = self._place(row)
        return file.where(inside)

    def _place(self, row: int) -> tuple[RowFile, int]:
        number = bisect_right(self._starts, row) - 1
        return self._files[number], row - self._starts[number]


def _open_json(path: Path, check: Check, problems: RowProblems) -> RowFile:
    """Either one JSON list, or one object per line."""
    with path.open("rb") as handle:
        start = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return (JsonList if start.startswith(b"[") else JsonLines)(path, check, problems)


Opener = Callable[[Path, Check, RowProblems], RowFile]
READERS: Mapping[str, Opener] = {
    ".jsonl": JsonLines,
    ".json": _open_json,
    ".csv": CsvRows,
    ".parquet": ParquetRows,
    ".arrow": ArrowRows,
}
_DATASET, _DATASET_DICT = "state.json", "dataset_dict.json"  # files of a Hugging Face dataset on disk
_SPLIT_NAMES: Mapping[Part, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "eval", "test"),
    "test": ("test",),
}


def _open_file(path: Path, check: Check, problems: RowProblems) -> RowFile:
    file = require_file(path)
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{file}: cannot read {suffix or 'a file without suffix'}; known: {', '.join(READERS)}")
    return READERS[suffix](file, check, problems)


def _files_of_one_kind(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in READERS]
    files = [path for path in found if not path.name.startswith((".", "_"))]
    if not files:
        raise DataError(f"{folder}: is a folder without data files; expected files that end in {', '.join(READERS)}")
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) > 1:
        examples = ", ".join(next(path.name for path in files if path.suffix.lower() == kind) for kind in kinds)
        raise DataError(f"{folder}: holds files of several kinds ({examples}); keep one kind in a folder")
    return files


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of one Hugging Face dataset, in the order of its rows."""
    state = _read_json(folder / _DATASET)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: its rows are selected by an index; save it again with flatten_indices()")
    try:
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / _DATASET}: names no data files; save the dataset again") from error


def _split_name(folder: Path, part: Part) -> str:
    names = _split_names(folder)
    if len(names) == 1:  # cut by actor_rollout.split, as a file is
        return names[0]
    for name in _SPLIT_NAMES[part]:
        if name in names:
            return name
    wanted = " or ".join(_SPLIT_NAMES[part])
    raise DataError(f"{folder}: holds the splits {', '.join(names)}; expected {wanted}, or name one split's folder")


def _split_names(folder: Path) -> list[str]:
    names = _read_json(folder / _DATASET_DICT).get("splits")
    if not isinstance(names, list) or not names:
        raise DataError(f"{folder / _DATASET_DICT}: names no splits; save the dataset again")
    return [str(name) for name in names]


def _read_json(file: Path) -> Row:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: is not a JSON object; save the dataset again")
    return content
