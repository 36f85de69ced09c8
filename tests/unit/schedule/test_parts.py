"""What one stage hands to the next bit by bit: in order, all of it, and with the error of whoever makes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from rlxf.core.waiting import in_thread
from rlxf.schedule import Parts


def nobody_stops() -> None: ...


def fill(parts: Parts[int], numbers: Iterator[int] | range, pause: float = 0.0) -> None:
    with parts.made():
        for number in numbers:
            time.sleep(pause)
            parts.put(number)


def test_parts_come_in_their_order_while_they_are_made() -> None:
    parts = Parts[int]()
    made = in_thread(lambda: fill(parts, range(20), pause=0.002), "maker")
    seen = []
    for number in parts.follow(nobody_stops):
        seen.append(number)
        if number == 0:
            assert not made.done()
    assert seen == list(range(20))
    made.result()


def test_whoever_comes_late_gets_all_of_them() -> None:
    parts = Parts[int]()
    assert parts.is_empty
    fill(parts, range(3))
    assert not parts.is_empty
    assert list(parts.follow(nobody_stops)) == list(parts.follow(nobody_stops)) == [0, 1, 2]


def test_the_error_of_the_maker_is_raised_after_the_parts_before_it() -> None:
    def break_down() -> Iterator[int]:
        yield 7
        raise ValueError("broken down")

    def take() -> None:
        for number in parts.follow(nobody_stops):
            seen.append(number)

    parts, seen = Parts[int](), list[int]()
    with pytest.raises(ValueError, match="broken down") as first:
        fill(parts, break_down())
    with pytest.raises(ValueError, match="broken down") as second:
        take()
    assert seen == [7]
    assert first.value is second.value


def test_whoever_waits_gives_up_when_nobody_needs_the_parts() -> None:
    class Stopped(Exception): ...

    def stop() -> None:
        raise Stopped

    parts = Parts[int]()
    parts.put(1)
    found = parts.follow(stop)
    assert next(found) == 1
    with pytest.raises(Stopped):
        next(found)


def test_parts_end_even_if_their_maker_is_interrupted() -> None:
    parts = Parts[int]()

    def interrupted() -> Iterator[int]:
        raise KeyboardInterrupt
        yield 0

    with suppress(KeyboardInterrupt):
        fill(parts, interrupted())
    with pytest.raises(KeyboardInterrupt):
        next(parts.follow(nobody_stops))
