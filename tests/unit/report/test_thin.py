"""Fewer points, the same picture."""

from __future__ import annotations

import math
import random

from rlxf.report.thin import bucket_size, keep_evenly, keep_newest, thin_curve, thin_means


def test_a_short_curve_stays_as_it_is_without_nan() -> None:
    assert thin_curve([1, 2, 3], [1.0, math.nan, 3.0], 10) == ([1, 3], [1.0, 3.0])


def test_a_thinned_curve_keeps_ends_and_extremes_in_order() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(10_000)]
    values[4711], values[815] = 9.0, -9.0
    steps, thinned = thin_curve(range(1, 10_001), values, 600)
    assert 500 <= len(steps) <= 600
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 10_000)
    assert thinned[steps.index(4712)] == 9.0
    assert thinned[steps.index(816)] == -9.0
    assert all(values[step - 1] == value for step, value in zip(steps, thinned, strict=True))
    assert bucket_size(10_000, 600) == 34
    assert bucket_size(600, 600) == 1


def test_means_of_stacked_curves_share_their_buckets() -> None:
    steps, means = thin_means([1, 2, 3, 4, 5], [[1.0, 3.0, 5.0, math.nan, 9.0], [math.nan] * 5], 3)
    assert steps == [2, 4, 5]
    assert means[0] == [2.0, 5.0, 9.0]
    assert all(math.isnan(value) for value in means[1])


def test_rows_are_kept_evenly_with_both_ends() -> None:
    assert keep_evenly(3, 5) == [0, 1, 2]
    assert keep_evenly(101, 5) == [0, 25, 50, 75, 100]
    assert keep_evenly(5, 1) == [4]
    assert keep_evenly(5, 0) == []


def test_all_of_the_newest_rows_stay_and_the_older_ones_stay_the_same() -> None:
    first, later = keep_newest(4500, 2000), keep_newest(4540, 2000)
    assert len(first) <= 2000
    assert first[0] == 0
    assert first[-1000:] == list(range(3500, 4500))
    assert set(first[:-1000]) <= set(later)
    assert set(keep_newest(4500, 300)) <= set(first)
