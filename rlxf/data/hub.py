"""The input of the preprocessing: files, a folder, or a data set of the Hugging Face Hub by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlxf.core.errors import DataError, RlxfError
from rlxf.core.jsonl import Row, RowProblems
from rlxf.data.readers import READERS, RowFile, open_rows

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_input(
    path: str,
    problems: RowProblems,
    *,
    streaming: bool = False,
    max_samples: int | None = None,
    cache_dir: str | None = None,
) -> RowFile:
    """The rows of a path, or of the training split of a data set on the Hub.

    Args:
        path: a file or folder; where there is none and it reads ``owner/name``, that data set.
        problems: collects rows that are no rows: broken JSON, bad UTF-8.
        streaming: fetch only the first ``max_samples`` rows of a data set on the Hub. Files are never read whole.
        max_samples: rows that are wanted at most.
        cache_dir: where a data set of the Hub is kept.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if Path(path).exists() or not _NAME.fullmatch(path) or Path(path).suffix in READERS:
        return open_rows(path, _nothing, problems)
    if streaming and max_samples is None:
        raise DataError(
            f"{path}: --streaming keeps the rows that it fetches in memory; say how many with --max-samples"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{path}: no such file or folder; to read it as a data set of the Hugging Face Hub the package datasets is "
            "needed: pip install 'rlxf[hub]'"
        ) from error
    try:
        found: Any = load_dataset(path, split="train", cache_dir=cache_dir, streaming=streaming)
        rows: Sequence[Row] = list(islice(found, max_samples)) if streaming else found
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:  # the library raises nearly any type: no network, no such name, a broken file
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: no such file or folder, and no data set of the Hugging Face Hub that can be read: {reason}"
        ) from error
    return HubRows(path, rows)


class HubRows:
    """The rows of a data set of the Hub: a `RowFile`."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        if not len(rows):
            raise DataError(f"{name}: holds no rows")
        self.path = Path(name)
        self.columns = tuple(rows[0])
        self.bad: dict[int, str] = {}
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"


def _nothing(row: Row) -> str | None:
    return None
