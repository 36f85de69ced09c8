"""Which checkpoint to go on from: a manifest with a hash of every file, and the newest folder that still fits its own.

A folder is made under a temporary name and renamed last (``run_folder.replace_folder``), so a crash leaves no half of
one. The manifest is for what comes later: a truncated copy, a flipped bit, a deleted shard, which no loader notices.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlxf.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint that cannot be used, and the first reasons why."""

    folder: Path
    problems: list[str]

    def __str__(self) -> str:
        return f"{self.folder}: {'; '.join(self.problems[:3])}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """``manifest.json``: size and SHA-256 of every other file below ``folder``."""
    files = {
        str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def find_problems(folder: Path) -> list[str]:
    """What keeps a checkpoint from being used, each naming its file; empty if every file is what was written."""
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if not isinstance(files, dict) or not files:
        return [f"{MANIFEST} names no file"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["num_bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, {expected['num_bytes']} were written")
        elif file_digest(path) != expected["sha256"]:
            problems.append(f"{name} is not what was written (SHA-256 differs)")
    return problems


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below ``root``, oldest first; temporary folders do not count."""
    if not root.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def newest_good(root: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint whose files are all whole, and the damaged ones that are newer.

    Returns:
        (None, []) if there is no checkpoint at all: a run then starts at the beginning.

    Raises:
        CheckpointError: there are checkpoints, and none is whole. Starting anew must be asked for, it never just
            happens.
    """
    damaged: list[Damaged] = []
    for folder in reversed(list_checkpoints(root)):
        problems = find_problems(folder)
        if not problems:
            return folder, damaged
        damaged.append(Damaged(folder, problems))
    if damaged:
        listed = "\n".join(f"  {item}" for item in damaged)
        raise CheckpointError(
            f"no checkpoint below {root} is whole:\n{listed}\n"
            "restore one, or start from the beginning with training.resume=never"
        )
    return None, damaged


def require_good(folder: Path) -> None:
    """Check one checkpoint that the user named.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"training.resume = {folder}: no such folder")
    if problems := find_problems(folder):
        raise CheckpointError(f"training.resume = {Damaged(folder, problems)}; name another one, or `auto`")


def prune(root: Path, keep_latest: int, *, keep: frozenset[Path] = frozenset()) -> list[Path]:
    """Delete all but the ``keep_latest`` newest checkpoints (0 = keep all) and those in ``keep``; the deleted ones.

    Only folders that this program made are touched: named like a checkpoint, with a manifest, and no link.
    """
    if keep_latest == 0:
        return []
    deleted = []
    for folder in list_checkpoints(root)[:-keep_latest]:
        if folder not in keep and not folder.is_symlink() and (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
            deleted.append(folder)
    return deleted
