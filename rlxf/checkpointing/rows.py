"""Rows of a run's files that the disk did not take when a checkpoint was written: ``<checkpoint>/rows``.

The checkpoint may be on another disk. A run that goes on from it in the same folder writes them to their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = "rows"  # in a checkpoint


def save_rows(checkpoint: Path, rows: Mapping[str, bytes]) -> None:
    """Write the rows of each file under the file's name; nothing is written without any."""
    for name, content in rows.items():
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        (checkpoint / FOLDER / name).write_bytes(content)


def load_rows(checkpoint: Path) -> dict[str, bytes]:
    """What ``save_rows`` wrote, by the files' names."""
    return {path.name: path.read_bytes() for path in sorted((checkpoint / FOLDER).glob("*"))}
