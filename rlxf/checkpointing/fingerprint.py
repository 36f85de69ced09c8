"""Whether a run trains on the data that its checkpoint saw."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from rlxf.config.folders import data_files
from rlxf.config.schema import RunConfig
from rlxf.core.files import (
    file_digest,
)


def training_files(config: RunConfig) -> list[Path]:
    """What the run trains on."""
    if config.engine == "replay":
        return [Path(config.rollout.replay_path)] if config.rollout.replay_path else []
    return data_files(config.actor_rollout.data_path or ())


def fingerprint(*paths: Path) -> dict[str, Any] | None:
    """What tells whether data files are still the same; None without a file."""
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
