"""Which rows of a data file make up which step: a pure function of the step, whatever was asked for before."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from rlxf.data.readers import RowFile
from rlxf.errors import DataError
from rlxf.jsonl import Problems, Row

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drop:
    """An item is not made from this row, for this reason."""

    reason: str
    is_error: bool = False  # the recipe asks to stop at such a row


class RowOrder:
    """Rows of an endless stream of epochs; each epoch is every row once, shuffled by (seed, epoch) or in file order."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)  # a batch may reach into the next epoch

    def row(self, position: int) -> int:
        """The row at a position of the stream, 0 being the first row of the first epoch."""
        epoch, offset = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[offset]) if self._shuffle else offset

    def _make_permutation(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)


class Batches(Generic[T]):
    """Full batches of items made from the rows of a file; rows that give no item are passed over and counted.

    Which rows give one is found out as the run reaches them, so starting is fast. A step that is asked for out of order
    (a resumed run) looks at the rows before it first and gets the same batch as an undisturbed run.
    """

    def __init__(
        self, rows: RowFile, order: RowOrder, batch_size: int, make: Callable[[int, Row], T | Drop], *, strict: bool
    ) -> None:
        """``make`` turns a row number and a row into an item. ``strict``: look for drops that are errors at once."""
        self._rows = rows
        self._order = order
        self._batch_size = batch_size
        self._make = make
        self._status = bytearray(len(rows))  # per row: not looked at, kept or dropped
        self._cursors = [0]  # position in the stream at which each step starts, as far as known
        self.dropped: Counter[str] = Counter()  # rows passed over, by reason, each counted once
        if strict:
            self._refuse_errors()

    def batch(self, step: int) -> list[T]:
        """The items of a step, always ``batch_size`` of them."""
        made: dict[int, T] = {}
        rows = self.rows(step, made)
        return [made[row] if row in made else self._item(row) for row in rows]

    def rows(self, step: int, made: dict[int, T] | None = None) -> list[int]:
        """The row numbers of a step's items. Items that are made on the way are put into ``made``."""
        while len(self._cursors) <= step:
            self._rows_of_step(len(self._cursors) - 1, {})
        return self._rows_of_step(step, {} if made is None else made)

    def epoch(self, step: int) -> float:
        """Passes over the file at the end of a step."""
        while len(self._cursors) <= step + 1:
            self._rows_of_step(len(self._cursors) - 1, {})
        return self._cursors[step + 1] / self._order.num_rows

    def _rows_of_step(self, step: int, made: dict[int, T]) -> list[int]:
        """The rows of a step whose start is known; notes where the next step starts. Puts new items into ``made``."""
        position, rows = self._cursors[step], list[int]()
        while len(rows) < self._batch_size:
            row = self._order.row(position)
            position += 1
            if self._status[row] == _UNKNOWN:
                self._look_at(row, made)
            if self._status[row] == _KEPT:
                rows.append(row)
        if step + 1 == len(self._cursors):
            self._cursors.append(position)
        return rows

    def _look_at(self, row: int, made: dict[int, T]) -> None:
        item = self._make(row, self._rows[row])
        if not isinstance(item, Drop):
            self._status[row] = _KEPT
            made[row] = item
            return
        self._status[row] = _DROPPED
        if not self.dropped[item.reason]:
            log.warning(
                "%s: a row is dropped because %s; more of them are only counted", self._rows.where(row), item.reason
            )
        self.dropped[item.reason] += 1
        if self.dropped.total() == len(self._rows):
            reasons = "; ".join(f"{count} because {reason}" for reason, count in self.dropped.most_common())
            raise DataError(f"{self._rows.path}: all {len(self._rows)} rows are dropped: {reasons}")

    def _item(self, row: int) -> T:
        item = self._make(row, self._rows[row])
        assert not isinstance(item, Drop)  # the same row gave an item before
        return item

    def _refuse_errors(self) -> None:
        problems = Problems()
        for row in range(len(self._rows)):
            item = self._make(row, self._rows[row])
            if isinstance(item, Drop) and item.is_error:
                problems.add(self._rows.where(row), item.reason)
        problems.raise_any(len(self._rows))


_UNKNOWN, _KEPT, _DROPPED = range(3)
