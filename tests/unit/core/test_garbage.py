"""Cycles are searched for as before, whatever happened while a process was loading."""

from __future__ import annotations

import gc

from rlxf.core.garbage import searched_seldom


def test_inside_garbage_is_searched_for_less_often_and_afterwards_as_before() -> None:
    before = gc.get_threshold()
    with searched_seldom():
        assert all(inside > outside for inside, outside in zip(gc.get_threshold(), before, strict=True))
        assert gc.isenabled()
    assert gc.get_threshold() == before
