"""Files and folders that survive a crash and a power loss: written under another name, synced to disk, renamed last.

A folder cannot replace another in one step. ``publish`` puts the old one aside, renames the new one and then deletes
the old one. A crash between the two renames leaves no folder of that name; ``recover`` puts the old one back.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_WRITING, _ASIDE, _DELETING = "tmp", "aside", "old"  # how the hidden names of a folder end
_ENDS = rf"[0-9a-f]{{8}}\.(?:{_WRITING}|{_ASIDE}|{_DELETING})|\d+|partial|old"  # the last ones: of older revisions
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of a file system that cannot sync folders


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small file by ``content`` as readable JSON. See ``write_text``."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: after a crash it is the old one or the new one. Makes its folder."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_files({temporary: path})
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a write does not name its file
        raise


def append_whole(file: int, size: int, content: bytes, *, sync: bool = False) -> None:
    """Append to an open file all of ``content``, or nothing.

    Args:
        file: descriptor, opened with ``O_APPEND``.
        size: bytes of the file that stay. What is behind them, a part that an earlier call could not cut off, goes.
        content: what is appended.
        sync: it is on disk afterwards.

    Raises:
        OSError: nothing was appended.
    """
    if os.fstat(file).st_size > size:
        os.ftruncate(file, size)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        if sync:
            os.fsync(file)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, size)
        raise


class WholeLines:
    """Appends lines to a small file, each whole or not at all.

    What a full disk does not take waits in memory and comes before the next line. A line that a crash tore is cut off.
    It tells nobody: ``KeptFile``, which does, logs events, and events are such lines.

    Args:
        path: the file; the first line makes it. Nobody else writes it meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def add(self, line: str) -> None:
        """Append a line. Never raises for the sake of the disk."""
        self._waiting += f"{line}\n".encode()
        with suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._append(file)
            finally:
                os.close(file)

    def _append(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            size = os.pread(file, size, 0).rfind(b"\n") + 1
        append_whole(file, size, self._waiting)
        self._waiting = b""


def replace_files(renames: Mapping[Path, Path]) -> None:
    """Rename complete files (temporary name -> name), each once all of them are on disk. All are in one folder."""
    for temporary in renames:
        fsync(temporary)
    for temporary, path in renames.items():
        os.replace(temporary, path)
    for folder in {path.parent for path in renames.values()}:
        fsync(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)


def temporary_for(folder: Path) -> Path:
    """A new empty folder beside ``folder``, for what ``publish`` will give that name.

    No two have the same name: a process that a killed run has left behind cannot write into the next run's.
    """
    make_folder(folder.parent)
    temporary = _hidden(folder, _WRITING)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, folder: Path) -> None:
    """Rename a complete folder to ``folder``, once it is on disk. An older one of that name is deleted after that.

    At every moment the old or the new one is whole: under its name, or put aside for ``recover``.
    """
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    recover(folder)
    aside = _hidden(folder, _ASIDE)
    replaced = os.path.lexists(folder)
    if replaced:
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced:
            aside.rename(folder)
        raise
    fsync(folder.parent)
    for old in _put_aside(folder):
        _delete(old)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, published as ``folder`` at the end; deleted if an exception comes first."""
    temporary = temporary_for(folder)
    try:
        yield temporary
        publish(temporary, folder)
    finally:
        if temporary.exists():
            _delete(temporary)


def recover(folder: Path) -> None:
    """Put back the folder that a crash inside ``publish`` left aside; does nothing if ``folder`` exists."""
    found = _put_aside(folder)
    if found and not os.path.lexists(folder):
        max(found, key=lambda path: path.stat().st_mtime_ns).rename(folder)
        fsync(folder.parent)


def remove(folder: Path) -> None:
    """Rename a folder, then delete it, so that it is never seen half deleted under its name."""
    deleting = folder.rename(_hidden(folder, _DELETING))
    _delete(deleting)


def remove_leftovers(root: Path, names: str) -> None:
    """Clean up after a killed process in ``root``: recover folders that it was replacing, delete other hidden folders.

    Args:
        root: may be missing.
        names: regular expression of the names of the folders that are published there; no others are touched.
    """
    pattern = re.compile(rf"\.({names})\.(?:{_ENDS})")
    found = [
        (match[1], path)
        for path in (sorted(root.iterdir()) if root.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    for name in sorted({name for name, _ in found}):
        recover(root / name)
    for _, path in found:
        if path.exists():
            _delete(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path from there; empty without the folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def fsync(path: Path) -> None:
    """Wait until a file's content or a folder's names are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def _put_aside(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.{_ASIDE}"))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
