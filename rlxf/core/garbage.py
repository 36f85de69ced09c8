"""Python's search for garbage, while what a process imports and loads stays for good."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_SELDOM = (10_000, 20, 100)  # Python's own are 700, 10 and 10


@contextmanager
def searched_seldom() -> Iterator[None]:
    """Search for reference cycles less often inside.

    Libraries make half a million objects, and a search goes through all of them whenever a quarter was added. Those
    searches take a sixth of the time that a worker needs to import what it works with. Afterwards cycles are searched
    for as before, because one that holds a tensor would keep its memory.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def leave_out_what_is_loaded() -> None:
    """Search for cycles once more, and from now on only among what is made later.

    For when a process has imported and loaded what it works with. A search through all of it takes a quarter of a
    second, and one would fall into a step now and then. What is there now and becomes part of a cycle later stays until
    the next call, so nothing that is replaced in the course of a run should be there.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
