"""Disks that take no more: the reason behind a library's words, one clear line of it, and tries that are repeated."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rlxf.core.errors import DiskError

T = TypeVar("T")

PATIENCE_S = 30.0  # how long a write that must succeed waits for room
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 4.0
# What no waiting helps against: somebody has to change the folder or its rights.
_LASTING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NUMBER = re.compile(r"\(os error (\d+)\)")  # how safetensors ends its message
_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")  # torch.save says that it stopped, and not why
_SMALL = 2**20  # bytes: with less room than this, the disk was full


def disk_error(error: BaseException, path: Path) -> OSError | None:
    """The error of the disk behind ``error``, which writing ``path`` raised; None if it is none.

    torch and safetensors raise errors of their own in place of it.
    """
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError" and (match := _NUMBER.search(str(error))):
        return _named(int(match[1]), path)
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH):
        return _named(errno.ENOSPC if (free := _free_bytes(path)) is not None and free < _SMALL else errno.EIO, path)
    return None


def _named(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def explain(error: OSError, path: Path, key: str) -> str:
    """``<path>: No space left on device (ENOSPC), 0 bytes are free; make room, or ...``, in one line.

    Args:
        error: of the disk.
        path: the file, where the error names none.
        key: the recipe's key that names the folder.
    """
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    words = error.strerror or str(error)
    name = errno.errorcode.get(error.errno or 0)
    code = f" ({name})" if name else ""
    free = _free_bytes(place) if error.errno == errno.ENOSPC else None
    rest = "" if free is None else f", {free:,} bytes are free"
    if error.errno in _FULL:
        advice = f"make room, or name a folder on another disk in {key}"
    elif error.errno in _LASTING:
        advice = f"name a folder that can be written in {key}"
    else:
        advice = f"check the disk, or name another folder in {key}"
    return f"{place}: {words}{code}{rest}; {advice}"


def is_lasting(error: OSError) -> bool:
    """Whether the same write would fail in a moment, too."""
    return error.errno in _LASTING


@contextmanager
def writing(path: Path, key: str) -> Iterator[None]:
    """Inside, ``path`` or something below it is written; an error of the disk becomes one clear line.

    Args:
        path: the file, or the folder.
        key: the recipe's key that names the folder.

    Raises:
        DiskError: it could not be written.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error, path)
        if found is None:
            raise
        raise DiskError(explain(found, path, key), lasting=is_lasting(found)) from error


def patient(
    action: Callable[[], T], *, patience_s: float = PATIENCE_S, sleep: Callable[[float], None] = time.sleep
) -> T:
    """The result of ``action``; while the disk takes nothing it is done again, with pauses of ``patience_s`` in all.

    Raises:
        DiskError: the last one, or the first that no waiting helps against.
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return action()
        except DiskError as error:
            if error.lasting or patience_s <= 0:
                raise
        sleep(min(pause, patience_s))
        patience_s -= pause
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
