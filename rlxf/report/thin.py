"""Fewer points and rows, chosen so that the picture stays the same."""

from __future__ import annotations

from collections.abc import Sequence

Curve = tuple[list[int], list[float]]


def thin_curve(steps: Sequence[int], values: Sequence[float], limit: int) -> Curve:
    """At most ``limit`` points of a curve: its first and last, and the smallest and largest of each bucket of steps.

    NaN is left out. Peaks stay, because no bucket loses its extremes.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value == value]
    if len(known) > limit:
        inner, size = known[1:-1], bucket_size(len(known), limit)
        kept = [known[0]]
        for start in range(0, len(inner), size):
            bucket = inner[start : start + size]
            low, high = min(bucket, key=_value), max(bucket, key=_value)
            kept += [low] if low is high else [low, high] if low[0] < high[0] else [high, low]
        known = [*kept, known[-1]]
    return [step for step, _ in known], [value for _, value in known]


def bucket_size(rows: int, limit: int) -> int:
    """How many steps two points of a thinned curve stand for; 1 if it is not thinned."""
    return 1 if rows <= limit else -(-(rows - 2) // max((limit - 2) // 2, 1))


def thin_means(
    steps: Sequence[int], columns: Sequence[Sequence[float]], limit: int
) -> tuple[list[int], list[list[float]]]:
    """Means of several curves over the same buckets of steps, at most ``limit``: they can be stacked.

    The step of a bucket is its last one; a bucket without a number has NaN.
    """
    size = max(-(-len(steps) // limit), 1)
    starts = range(0, len(steps), size)
    ends = [steps[min(start + size, len(steps)) - 1] for start in starts]
    return ends, [[_mean(column[start : start + size]) for start in starts] for column in columns]


def keep_evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` of the numbers 0 to ``count`` - 1, evenly spaced, the first and last among them."""
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return list(range(count))[-limit:] if limit else []
    return sorted({round(index * (count - 1) / (limit - 1)) for index in range(limit)})


def keep_newest(count: int, limit: int) -> list[int]:
    """At most ``limit`` of the numbers 0 to ``count`` - 1: all of the newest, and evenly spaced ones of the older.

    The spacing is a power of two, so the older ones stay the same while ``count`` grows, until it doubles; and a
    smaller ``limit`` keeps a part of what a larger one keeps.
    """
    if count <= limit:
        return list(range(count))
    newest = limit // 2
    older, stride = count - newest, 1
    while -(-older // stride) > limit - newest:
        stride *= 2
    return [*range(0, older, stride), *range(older, count)]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
