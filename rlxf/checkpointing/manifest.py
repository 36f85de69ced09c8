"""The manifest of a checkpoint: size and hash of every file. No loader notices a truncated copy or a flipped bit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlxf.core.files import file_digest

MANIFEST = "manifest.json"
DRIVER = "driver.json"


def write_manifest(folder: Path) -> None:
    """``manifest.json``: size and SHA-256 of every other file below ``folder``."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = list(pool.map(file_digest, paths))
    files = {
        str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (folder / MANIFEST).write_text(_as_text({"files": files}))


def find_problems(folder: Path) -> list[str]:
    """Why a checkpoint cannot be used, one line per file; empty if every file is as it was written."""
    try:
        files = _manifest(folder)
    except FileNotFoundError:
        return [f"no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if DRIVER not in files:
        return [f"{MANIFEST} names no {DRIVER}"]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _file_problem(folder / item[0], item[0], *item[1]), files.items())
        return [problem for problem in found if problem is not None]


def _file_problem(path: Path, name: str, num_bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != num_bytes:
        return f"{name} has {path.stat().st_size} bytes, {num_bytes} were written"
    return None if file_digest(path) == sha256 else f"{name} has changed since it was written (SHA-256 differs)"


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file that was written."""
    text = (folder / MANIFEST).read_text()
    content: dict[str, Any] = json.loads(text)
    if text != _as_text(content):
        raise ValueError("its contents have changed since it was written")
    return {name: (written["num_bytes"], written["sha256"]) for name, written in content["files"].items()}


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
