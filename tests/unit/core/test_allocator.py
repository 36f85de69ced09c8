"""glibc's allocator in a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")


def run(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return done.stdout


FREED = """
import psutil, torch
from rlxf.platform import get_platform
platform = get_platform("cpu")
platform.keep_freed_memory()
resident = psutil.Process().memory_info
before = resident().rss
for turn in range(2):
    tensors = [torch.ones(2**21) for _ in range(20)]
    del tensors
freed = resident().rss
platform.empty_cache()
print(*(rss - before for rss in (freed, resident().rss)))
"""
TENSORS = 20 * 2**23  # bytes


def test_freed_memory_of_a_cpu_is_kept_until_the_cache_is_emptied() -> None:
    freed, emptied = map(int, run(FREED).split())
    assert freed > 0.9 * TENSORS
    assert emptied < 0.1 * TENSORS


@pytest.mark.parametrize(
    "variable", ["MALLOC_TRIM_THRESHOLD_=131072", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=131072"]
)
def test_what_a_user_says_of_the_allocator_holds(variable: str) -> None:
    name, _, value = variable.partition("=")
    freed, _ = map(int, run(FREED, **{name: value}).split())
    assert freed < 0.1 * TENSORS


ARENAS = """
import ctypes, os, threading
from rlxf.core.allocator import share_heap
share_heap()
all_there = threading.Barrier(9)
def work():
    held = [bytes(5000) for _ in range(100)]
    all_there.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
os.dup2(1, 2)  # where malloc_stats writes
ctypes.CDLL(None).malloc_stats()
all_there.wait()
"""


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, 1), ({"MALLOC_ARENA_MAX": "4"}, 4)], ids=["the driver's own", "the user's"]
)
def test_threads_share_a_heap(variables: dict[str, str], expected: int) -> None:
    assert run(ARENAS, **variables).count("Arena ") == expected
