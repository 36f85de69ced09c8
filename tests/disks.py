"""Disks that are full for a while: injected errors, which need no rights, and small file systems, which need root."""

from __future__ import annotations

import builtins
import errno as numbers
import io
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

FILLER = "filler"


@contextmanager
def disk_takes(num_bytes: int | None, folder: Path, errno: int = numbers.ENOSPC) -> Iterator[None]:
    """Inside, files below ``folder`` can grow by so many bytes and then no more; None: without a limit.

    It knows ``os.write``, which writes a part first, and ``open`` for writing, which fails when nothing is left.
    """
    if num_bytes is None:
        yield
        return
    left, write, opened = [num_bytes], os.write, io.open
    error = OSError(errno, os.strerror(errno))

    def limited(descriptor: int, data: Any) -> int:
        if not _is_below(descriptor, folder):
            return write(descriptor, data)
        if not left[0]:
            raise error
        taken = min(left[0], len(data))
        left[0] -= taken
        return write(descriptor, data[:taken])

    def full(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not left[0] and set(mode) & set("wxa+") and not isinstance(file, int) and _is_path_below(file, folder):
            raise OSError(errno, os.strerror(errno), str(file))
        return opened(file, mode, *args, **options)

    with patch.object(os, "write", limited), patch.object(io, "open", full), patch.object(builtins, "open", full):
        yield


def _is_below(descriptor: int, folder: Path) -> bool:
    try:
        return _is_path_below(os.readlink(f"/proc/self/fd/{descriptor}"), folder)
    except OSError:
        return False


def _is_path_below(path: Any, folder: Path) -> bool:
    return Path(path).absolute().is_relative_to(folder)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """An empty file system of that size; the test is skipped where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Take all the room of a small file system, with a file of this name."""
    with (folder / FILLER).open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            continue
