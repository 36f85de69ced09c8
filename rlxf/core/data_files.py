"""The files that a data path stands for."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path


def data_files(paths: Iterable[str]) -> list[Path]:
    """Every file that data paths stand for, in order; those of a folder sorted, subfolders included."""
    files = []
    for path in map(Path, paths):
        inside = (found for found in sorted(path.rglob("*")) if found.is_file() and not found.name.startswith("."))
        files += list(inside) if path.is_dir() else indexed_files(path) or [path]
    return files


def indexed_files(prefix: Path) -> list[Path]:
    """The indexed files that a data path stands for when it is their prefix."""
    return sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}_packed_*_document.*"))
