"""Whether a run trains on the data that its checkpoint saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from rlxf.core.data_files import data_files
from rlxf.core.files import file_digest


def fingerprint(data_paths: Iterable[str]) -> dict[str, Any] | None:
    """What tells whether the files that data paths stand for are still the same; None without a path."""
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
    """The hash of a file that may be large, and is asked for twice in a resumed run."""
    return file_digest(path)
