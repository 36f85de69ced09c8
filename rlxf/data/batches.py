"""Which rows make up which step: a pure function of the step, which earlier requests do not change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rlxf.core.errors import DataError
from rlxf.core.jsonl import RowProblems
from rlxf.data.order import Order

log = logging.getLogger(__name__)
T = TypeVar("T")
MALFORMED = "it is malformed"


@dataclass(frozen=True, slots=True)
class DropReason:
    """Why no item is made from a row."""

    reason: str
    is_error: bool = False  # the recipe asks to stop at such a row


class Rows(Protocol):
    """What batches need to know of the rows; ``make`` reads them."""

    name: str  # of the file, or of the first of several, for messages

    @property
    def bad(self) -> Mapping[int, str]:
        """Rows that are no items because they are malformed."""
        ...

    def __len__(self) -> int: ...

    def where(self, row: int) -> str: ...


class BatchStream(Generic[T]):
    """Full batches of items made from rows; rows that give no item are passed over and counted.

    A row is looked at when the run reaches it, so starting is fast. If a step is asked for out of order, the rows
    before it are looked at first, and the batch is the same as in an uninterrupted run. A resumed run can skip that:
    ``stream`` says where a step begins, and ``go_on`` begins there.
    """

    def __init__(
        self, rows: Rows, order: Order, batch_size: int, make: Callable[[int], T | DropReason], *, strict: bool
    ) -> None:
        """``make`` turns a row's number into an item. ``strict``: look at once for drops that are errors."""
        self._rows = rows
        self._order = order
        self._batch_size = batch_size
        self._make = make
        self._status = bytearray(len(rows))  # per row: not looked at, kept or dropped
        self._cursors = {0: 0}  # step -> position in the stream at which it starts, as far as known
        self._counted = 0  # drops before this position are in the counts already
        self._first: dict[str, str] = {}  # of each reason, where it was first seen
        self.dropped: Counter[str] = Counter()  # rows passed over, by reason, each counted once
        if rows.bad:
            for row in order.in_file_order():
                if row in rows.bad:
                    self._drop(row, MALFORMED)
        if strict:
            self._refuse_errors()

    def batch(self, step: int) -> list[T]:
        """The items of a step, always ``batch_size`` of them."""
        made: dict[int, T] = {}
        rows = self.rows(step, made)
        return [made[row] if row in made else self._item(row) for row in rows]

    def rows(self, step: int, made: dict[int, T] | None = None) -> list[int]:
        """The row numbers of a step's items. Items that are made on the way are put into ``made``."""
        self._find(step)
        return self._rows_of_step(step, {} if made is None else made)

    def epoch(self, step: int) -> float:
        """Passes over the rows at the end of a step."""
        return self._find(step + 1) / self._order.num_rows

    def stream(self, step: int) -> dict[str, Any]:
        """Where a step begins, and what was counted so far, as JSON data for ``go_on``. One of the newest two steps.

        The step itself may have been read: a run that ends in it saves the step before, and reads it again.
        """
        position = self._find(step)
        return {
            "previous": self._find(step - 1) if step else 0,
            "position": position,
            "counted": max(self._cursors.values()),
            "dropped": dict(self.dropped),
            "first": dict(self._first),
        }

    def go_on(self, step: int, rows: Sequence[int], stream: Mapping[str, Any]) -> bool:
        """Begin at a step, without a look at the rows before it.

        Args:
            step: the next one.
            rows: of the step before it.
            stream: what ``stream`` returned for ``step``.

        Returns:
            Whether ``rows`` are in the stream before ``step``. If not, the order is another one, and nothing was
            changed.
        """
        previous, position = stream["previous"], stream["position"]
        passed = (self._order.row(place) for place in range(previous, position))
        if not all(row in passed for row in rows):  # `in` continues behind the row found last
            return False
        self._cursors |= {step: position} if step == 0 else {step - 1: previous, step: position}
        self._counted = stream["counted"]
        self._first = {**self._first, **stream["first"]}
        self.dropped |= Counter(stream["dropped"])  # `|=` keeps the larger count of each reason
        return True

    def _find(self, step: int) -> int:
        """The position at which a step starts; looks at the rows of the steps before it, as far as it must."""
        known = step
        while known not in self._cursors:
            known -= 1
        for number in range(known, step):
            self._rows_of_step(number, {})
        return self._cursors[step]

    def in_file_order(self) -> Iterator[T]:
        """Every item once, in file order."""
        for row in self._order.in_file_order():
            made: dict[int, T] = {}
            if self._is_kept(row, made):
                yield made[row] if row in made else self._item(row)

    def num_kept(self) -> int:
        """Rows that give an item; looks at all of them that no step has reached yet."""
        return sum(self._is_kept(row, {}) for row in self._order.in_file_order())

    def summary(self) -> list[str]:
        """For each reason, how many rows were passed over so far and where the first of them is."""
        return [
            f"{self._rows.name}: {count} rows are left out because {reason} (first: {self._first[reason]})"
            for reason, count in self.dropped.most_common()
        ]

    def _rows_of_step(self, step: int, made: dict[int, T]) -> list[int]:
        """The rows of a step whose start is known; notes where the next step starts. Puts new items into ``made``."""
        position, rows = self._cursors[step], list[int]()
        while len(rows) < self._batch_size:
            row = self._order.row(position)
            if self._is_kept(row, made, position):
                rows.append(row)
            position += 1
        self._cursors.setdefault(step + 1, position)
        return rows

    def _is_kept(self, row: int, made: dict[int, T], position: int | None = None) -> bool:
        if self._status[row] == _UNKNOWN:
            item = self._make(row)
            if isinstance(item, DropReason):
                if item.is_error:
                    raise DataError(f"{self._rows.where(row)}: {item.reason}")
                is_new = position is None or (position >= self._counted and self._order.is_first(position))
                self._drop(row, item.reason, is_new=is_new)
            else:
                self._status[row] = _KEPT
                made[row] = item
        return self._status[row] == _KEPT

    def _drop(self, row: int, reason: str, *, is_new: bool = True) -> None:
        self._status[row] = _DROPPED
        if not is_new:  # counted before the run was resumed
            return
        if reason not in self._first:
            self._first[reason] = where = self._rows.where(row)
            log.warning("%s: a row is dropped because %s; further rows are counted without a message", where, reason)
        self.dropped[reason] += 1
        if self.dropped.total() == self._order.num_rows:
            reasons = "; ".join(f"{count} because {why}" for why, count in self.dropped.most_common())
            raise DataError(f"{self._rows.name}: all {self._order.num_rows} rows are dropped: {reasons}")

    def _item(self, row: int) -> T:
        item = self._make(row)
        assert not isinstance(item, DropReason)  # the same row gave an item before
        return item

    def _refuse_errors(self) -> None:
        problems = RowProblems()
        for row in self._order.in_file_order():
            item = self._make(row) if row not in self._rows.bad else None
            if isinstance(item, DropReason) and item.is_error:
                problems.add(self._rows.where(row), item.reason)
        problems.raise_any(self._order.num_rows)


_UNKNOWN, _KEPT, _DROPPED = range(3)
