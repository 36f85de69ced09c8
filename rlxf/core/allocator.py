"""What glibc's allocator keeps of a process. Other C libraries are left as they are, and so is what a user has set."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping

# Parameters of mallopt in <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES, _MMAPPED_BYTES = 2**30, 2**25  # the latter is the largest that every glibc takes


@functools.cache
def keep_freed_memory() -> None:
    """What an update has freed stays for the next one, up to 1 GiB, until ``trim_heap``.

    By itself glibc gives it back at once, and the kernel clears every page again when it is next touched.
    """
    # One of them alone would end glibc's own choice of the other.
    options = {_TRIM_THRESHOLD: _KEPT_BYTES, _MMAP_THRESHOLD: _MMAPPED_BYTES}
    _set(options, unless=("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))


@functools.cache
def share_heap() -> None:
    """The threads that start from now on share the first one's heap.

    By itself glibc gives threads heaps of their own, up to eight per core. The many short threads of a driver, its own
    and Ray's, leave gaps in all of them, which grow from step to step.
    """
    _set({_ARENA_MAX: 1}, unless=("MALLOC_ARENA_MAX",))


def trim_heap() -> None:
    """glibc keeps what was freed between two blocks in use; others give it back by themselves, or not at all."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _set(options: Mapping[int, int], *, unless: tuple[str, ...]) -> None:
    """``unless``: variables by which a user has decided it."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None and not any(name in os.environ for name in (*unless, "GLIBC_TUNABLES")):
        for option, value in options.items():
            mallopt(option, value)


@functools.cache
def _of_libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)
