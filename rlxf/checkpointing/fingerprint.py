"""Tells whether a resumed run trains on the same data as the run that wrote its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from rlxf.core.data_files import data_files
from rlxf.core.files import file_digest


def fingerprint(data_paths: Iterable[str]) -> dict[str, Any] | None:
    """Size and hash of the files that data paths stand for, by which a change is noticed; None without a file."""
    paths = data_files(data_paths)
    if not paths:
        return None
    statuses = [path.stat() for path in paths]
    digests = [_digest(path, now.st_size, now.st_mtime_ns) for path, now in zip(paths, statuses, strict=True)]
    return {
        "path": ", ".join(map(str, paths)) if len(paths) < 4 else f"{paths[0]} and {len(paths) - 1} more",
        "num_bytes": sum(now.st_size for now in statuses),
        "sha256": digests[0] if len(paths) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest(),
    }


@cache
def _digest(path: Path, num_bytes: int, modified_ns: int) -> str:
    """SHA-256 of a file. Cached, because files may be large and a resumed run asks twice."""
    return file_digest(path)
