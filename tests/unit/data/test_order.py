"""Order of rows: each once per epoch, sources in their shares, parts disjoint, a pure function of the position."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.data.order import BLOCK, MixedOrder, RowOrder, block_counts, part_range
from rlxf.data.readers import Part

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
PARTS: tuple[Part, ...] = ("train", "valid", "test")


def ranges_of(sizes: list[int], gap: int = 3) -> list[range]:
    """Stretches with rows between them that belong to another part."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(size + gap for size in sizes), strict=True)]


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1), shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_every_row_of_the_part_comes_once_per_epoch(sizes: list[int], seed: int, shuffle: bool, epoch: int) -> None:
    ranges = ranges_of(sizes)
    order = RowOrder(ranges, (seed,) if shuffle else None)
    rows = [order.row(epoch * order.num_rows + i) for i in range(order.num_rows)]
    everything = [row for stretch in ranges for row in stretch]
    assert sorted(rows) == everything == list(order.in_file_order())
    assert shuffle or rows == everything


@settings(deadline=None, max_examples=40)
@given(
    sizes=SIZES,
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_every_source_of_a_mixture_has_epochs_and_a_share_of_its_own(
    sizes: list[int], seed: int, shuffle: bool, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    ranges = ranges_of(sizes)
    order = MixedOrder(ranges, weights, seed=seed, shuffle=shuffle)
    rows = [order.row(position) for position in range(2 * BLOCK)]
    for stretch, weight in zip(ranges, weights, strict=True):
        own = [row for row in rows if row in stretch]
        assert abs(len(own) / len(rows) - weight / sum(weights)) <= max(1, len(sizes) - 1) / BLOCK
        for start in range(0, len(own) - len(stretch) + 1, len(stretch)):
            assert sorted(own[start : start + len(stretch)]) == list(stretch)
    asked_backwards = MixedOrder(ranges, weights, seed=seed, shuffle=shuffle)
    positions = data.draw(st.lists(st.integers(0, 2 * BLOCK - 1), max_size=20))
    assert [asked_backwards.row(position) for position in positions] == [rows[position] for position in positions]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mixture_keeps_its_shares_from_the_first_rows_on(shuffle: bool) -> None:
    order = MixedOrder([range(100), range(100, 130)], [3, 1], seed=1, shuffle=shuffle)
    second = [order.row(position) >= 100 for position in range(3 * BLOCK)]
    for length in range(1, len(second)):
        assert abs(sum(second[:length]) - length / 4) <= 2


def test_a_mixture_is_shuffled_by_its_seed() -> None:
    orders = [MixedOrder([range(50), range(50, 90)], [1, 1], seed=seed, shuffle=True) for seed in (1, 1, 2)]
    streams = [[order.row(position) for position in range(200)] for order in orders]
    assert streams[0] == streams[1] != streams[2]
    assert [row >= 50 for row in streams[0]] != [row >= 50 for row in streams[2]]
    blocks = [[orders[0].row(start + i) >= 50 for i in range(BLOCK)] for start in (0, BLOCK)]
    assert blocks[0] != blocks[1]


@settings(deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_shares_of_a_block_add_up_and_none_is_empty(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1


@settings(deadline=None)
@given(num_rows=st.integers(0, 10**6), shares=st.tuples(*[st.floats(0, 1000)] * 3).filter(lambda shares: shares[0] > 0))
def test_parts_are_disjoint_cover_everything_and_have_their_shares(
    num_rows: int, shares: tuple[float, float, float]
) -> None:
    parts = [part_range(num_rows, shares, part) for part in PARTS]
    assert parts[0].start == 0
    assert parts[2].stop == num_rows
    assert all(one.stop == next_one.start for one, next_one in pairwise(parts))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - num_rows * share / sum(shares)) <= 1.001


def test_a_split_is_that_of_megatron() -> None:
    from megatron.core.datasets.utils import Split, normalize

    edges = [0.0, *accumulate(normalize([95.0, 4.0, 1.0]))]
    for num_rows in (7, 100, 299, 12345):
        ours = [part_range(num_rows, (95, 4, 1), part) for part in PARTS]
        theirs = [range(round(num_rows * a), round(num_rows * b)) for a, b in pairwise(edges)]
        assert ours == theirs
    assert [split.name for split in Split] == list(PARTS)


def test_labels_of_a_mixture_are_spread_over_the_block() -> None:
    order = MixedOrder([range(10), range(10, 20)], [9, 1], seed=3, shuffle=True)
    tenths = [Counter(order.row(p) >= 10 for p in range(start, start + 100))[True] for start in range(0, BLOCK, 100)]
    assert set(tenths) <= set(range(8, 13))
    assert sum(tenths) == BLOCK // 10
