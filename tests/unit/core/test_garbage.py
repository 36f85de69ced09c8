"""Cycles are searched for as before, whatever happened while a process was loading."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from rlxf.core.garbage import leave_out_what_is_loaded, searched_seldom


def test_inside_garbage_is_searched_for_less_often_and_afterwards_as_before() -> None:
    before = gc.get_threshold()
    with searched_seldom():
        assert all(inside > outside for inside, outside in zip(gc.get_threshold(), before, strict=True))
        assert gc.isenabled()
    assert gc.get_threshold() == before


class Node:
    """Part of a cycle of its own."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_loaded_is_searched_once_more_and_then_left_out() -> None:
    before, kept = weakref.ref(Node()), [Node()]
    leave_out_what_is_loaded()
    assert before() is None
    there = {id(each) for each in gc.get_objects()}
    assert id(kept[0]) not in there
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_what_was_left_out_is_found_by_the_next_call() -> None:
    kept = [Node()]
    leave_out_what_is_loaded()
    node = weakref.ref(kept.pop())
    gc.collect()
    assert node() is not None
    leave_out_what_is_loaded()
    assert node() is None
