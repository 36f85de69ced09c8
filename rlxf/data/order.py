"""The order in which a run sees rows: pure functions of the position in an endless stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from rlxf.data.readers import Part

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
BLOCK = 1000  # positions in which a mixture keeps its shares exactly
_PARTS: tuple[Part, ...] = ("train", "valid", "test")


class Order(Protocol):
    """An endless stream of the rows of one part of the data."""

    num_rows: int  # of the part

    def row(self, position: int) -> int:
        """The row at a position of the stream, from 0."""
        ...

    def in_file_order(self) -> Iterator[int]:
        """Every row of the part once."""
        ...

    def is_first(self, position: int) -> bool:
        """Whether the row at a position of the stream comes there for the first time."""
        ...


class RowOrder:
    """Epochs, each of which is every row once: shuffled by ``key`` and its number, or in file order without a key."""

    def __init__(self, ranges: Sequence[range], key: Sequence[int] | None) -> None:
        """``ranges``: the rows, as stretches of the numbering of all. ``key``: the seed, and what goes with it."""
        self._ranges = [rows for rows in ranges if rows]
        self._starts = [0, *accumulate(len(rows) for rows in self._ranges)]
        self.num_rows = self._starts[-1]
        self._key = key
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)  # a batch may reach into the next epoch

    def row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if self._key is not None:
            offset = int(self._permutation(epoch)[offset])
        number = bisect_right(self._starts, offset) - 1
        return self._ranges[number][offset - self._starts[number]]

    def in_file_order(self) -> Iterator[int]:
        return (row for rows in self._ranges for row in rows)

    def is_first(self, position: int) -> bool:
        return position < self.num_rows

    def _make_permutation(self, epoch: int) -> Indices:
        assert self._key is not None
        seed, *more = self._key
        return np.random.default_rng([seed, epoch, *more]).permutation(self.num_rows)


class MixedOrder:
    """Several sources in fixed shares, each with epochs of its own.

    Of every ``BLOCK`` positions each source has its share, to a thousandth; within a block its rows are spread evenly,
    at places that the seed decides.
    """

    def __init__(self, ranges: Sequence[range], weights: Sequence[float], *, seed: int, shuffle: bool) -> None:
        keys = [(seed, number) if shuffle else None for number in range(1, len(ranges) + 1)]
        self._orders = [RowOrder([rows], key) for rows, key in zip(ranges, keys, strict=True)]
        self._counts = block_counts(weights)
        self._seed = seed if shuffle else None
        self.num_rows = sum(order.num_rows for order in self._orders)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def row(self, position: int) -> int:
        source, own = self._place(position)
        return self._orders[source].row(own)

    def is_first(self, position: int) -> bool:
        source, own = self._place(position)
        return self._orders[source].is_first(own)

    def _place(self, position: int) -> tuple[int, int]:
        """The source of a position, and the position in that source's own stream."""
        block, offset = divmod(position, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[offset])
        return source, block * self._counts[source] + int(ranks[offset])

    def in_file_order(self) -> Iterator[int]:
        return (row for order in self._orders for row in order.in_file_order())

    def _make_block(self, block: int) -> tuple[Indices, Indices]:
        """Of each position of a block its source, and how many positions before it have the same source."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        ranks = np.concatenate([np.arange(count) for count in self._counts])
        within = 0.5 if self._seed is None else np.random.default_rng([self._seed, block, 0, 1]).random(BLOCK)
        places = (ranks + within) / np.repeat(
            self._counts, self._counts
        )  # a source's j-th row falls into its j-th slot
        order = np.argsort(places, kind="stable")
        return sources[order], ranks[order]


def block_counts(weights: Sequence[float]) -> list[int]:
    """How many of ``BLOCK`` positions each source gets: its share, rounded so that they add up, and at least one."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := BLOCK - int(counts.sum())) != 0:  # the source that is furthest from its share gives or takes one
        if missing > 0:
            counts[int(np.argmax(exact - counts))] += 1
        else:
            counts[int(np.argmax(np.where(counts > 1, counts - exact, -np.inf)))] -= 1
    return [int(count) for count in counts]


def part_range(num_rows: int, shares: Sequence[float], part: Part) -> range:
    """The rows of a part: train, validation and test rows lie one behind the other, in proportion to their shares."""
    edges = [round(num_rows * edge / sum(shares)) for edge in accumulate(shares, initial=0.0)]
    number = _PARTS.index(part)
    return range(edges[number], edges[number + 1])
