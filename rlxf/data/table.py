"""All rows of a run: those of every source, each read in its own format, with one numbering."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from rlxf.config.roles import DataConfig
from rlxf.core.errors import ConfigError, DataError
from rlxf.core.jsonl import Row, RowProblems
from rlxf.data.fields import BadRow
from rlxf.data.formats import Layout, Task, find_layout
from rlxf.data.order import MixedOrder, Order, RowOrder, part_range
from rlxf.data.readers import Concatenated, Part, RowFile, has_own_parts, open_rows

log = logging.getLogger(__name__)
R = TypeVar("R")
Read = Callable[[Layout, Row], R]  # what a stage takes from a row


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which rows a run reads, and how many a step takes of them."""

    config: DataConfig  # of the rows that are trained on
    eval_path: tuple[str, ...] | None = None  # ``eval.data_path``
    batch_size: int  # items per step
    seed: int


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of ``data_path``."""

    file: RowFile
    layout: Layout
    rows: range  # of the part, counted from the file's first row
    columns: tuple[str, ...]  # those that are not in the prompt


class Table(Generic[R]):
    """The rows of all sources. A row's number is its place in its source, plus the rows of all sources before it.

    Numbers do not depend on the part: a row of the validation part has the number that it has in its file.
    """

    def __init__(self, sources: Sequence[Source], read: Read[R]) -> None:
        self._sources = sources
        self._read = read
        first = sources[0].file.path
        self._rows = Concatenated(first, [source.file for source in sources])
        self._starts = [0, *accumulate(len(source.file) for source in sources)]
        self.bad = self._rows.bad
        self.name = str(first) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
        self.columns = tuple(dict.fromkeys(name for source in sources for name in source.columns))
        self.ranges = [
            range(start + source.rows.start, start + source.rows.stop)
            for start, source in zip(self._starts, sources, strict=False)
        ]  # the rows of the part, by source

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        return self._rows.where(row)

    def __getitem__(self, row: int) -> R:
        return self._read(self._source(row).layout, self._rows[row])

    def _source(self, row: int) -> Source:
        return self._sources[bisect_right(self._starts, row) - 1]


def open_table(settings: DataSettings, part: Part, task: Task, read: Read[R]) -> Table[R]:
    """The rows of one part of a run's data, each read once to check it.

    ``valid`` and ``test``: the rows of ``eval.data_path``, else the part that ``actor_rollout.split`` or the dataset
    itself sets aside, else the training rows.

    Raises:
        DataError: a file cannot be read, or has more malformed rows than ``actor_rollout.max_bad_rows``.
    """
    config = settings.config
    aside = part != "train" and settings.eval_path is not None
    paths = (settings.eval_path if aside else config.data_path) or ()
    if not paths:
        key = "actor_rollout.data_path" if part == "train" else "neither eval.data_path nor actor_rollout.data_path"
        raise ConfigError(f"{key} is {'not ' if part == 'train' else ''}set; expected a data file, such as a .jsonl")
    problems = RowProblems(config.max_bad_rows, "actor_rollout.max_bad_rows")
    shares = (0.0, 100.0, 0.0) if aside else config.split
    if not aside and part != "train" and not _sets_aside(paths, shares, part):
        log.warning(
            "no row is set aside for evaluation (actor_rollout.split, eval.data_path): evaluations use training rows"
        )
        part, shares = "train", (100.0, 0.0, 0.0)
    sources = [_open_source(path, config, part, shares, task, read, problems) for path in paths]
    if problems.total:
        text = "\n".join(problems.report())
        log.warning("malformed rows are left out (actor_rollout.max_bad_rows=%d):\n%s", problems.allowed, text)
    if not any(source.rows for source in sources):
        raise DataError(
            f"{paths[0]}: actor_rollout.split={shares[0]:g},{shares[1]:g},{shares[2]:g} leaves no row for {part}"
        )
    return Table(sources, read)


def order_of(table: Table[R], settings: DataSettings, part: Part) -> Order:
    """Training rows shuffled together, or mixed by ``actor_rollout.data_weights``; other parts in file order."""
    weights, seed, shuffle = settings.config.data_weights, settings.seed, not settings.config.no_shuffle
    if part != "train" or not weights:
        return RowOrder(table.ranges, (seed,) if part == "train" and shuffle else None)
    return MixedOrder(table.ranges, weights, seed=seed, shuffle=shuffle)


def _sets_aside(paths: Sequence[str], shares: Sequence[float], part: Part) -> bool:
    return bool(shares[1 if part == "valid" else 2]) or any(has_own_parts(path) for path in paths)


class _Check(Generic[R]):
    """Checks that rows can be read. The first row that can be read decides the format; all others must have it."""

    def __init__(self, config: DataConfig, task: Task, read: Read[R]) -> None:
        self.layout: Layout | None = None
        self._config, self._task, self._read = config, task, read

    def __call__(self, row: Row) -> str | None:
        try:
            layout = self.layout or find_layout(row, self._config, self._task)
            self._read(layout, row)
        except BadRow as error:
            return str(error)
        self.layout = layout
        return None


def _open_source(
    path: str, config: DataConfig, part: Part, shares: Sequence[float], task: Task, read: Read[R], problems: RowProblems
) -> Source:
    check = _Check(config, task, read)
    file = open_rows(path, check, problems, part)
    if check.layout is None:
        raise DataError(f"{path}: all {len(file)} rows are malformed; the first: {file.bad[0]}")
    _require_mapped(file, config)
    rows = range(len(file)) if has_own_parts(path) else part_range(len(file), shares, part)
    columns = tuple(name for name in file.columns if name not in check.layout.prompt_columns)
    return Source(file, check.layout, rows, columns)


def _require_mapped(file: RowFile, config: DataConfig) -> None:
    for name, column in (config.map_keys or {}).items():
        if column and name in ("query", "history", "system") and column not in file.columns:
            has = ", ".join(file.columns)
            raise DataError(f"{file.path}: actor_rollout.map_keys.{name} = {column!r}: no such column; it has: {has}")
