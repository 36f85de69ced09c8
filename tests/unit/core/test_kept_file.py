"""Files of rows on a disk that is full for a while."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from rlxf.core import kept_file
from rlxf.core.errors import DiskError
from rlxf.core.jsonl import open_after
from rlxf.core.kept_file import AGAIN_S, KeptFile
from tests.disks import disk_takes


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def row(step: int) -> bytes:
    return b'{"step": %d, "loss": 0.123456789}\n' % step


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 1, 40, 67])  # bytes: nothing, parts of a row, rows and a part
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_rows_that_the_disk_does_not_take_are_written_with_the_next_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int, code: int
) -> None:
    caplog.set_level(logging.INFO)
    path, clock = tmp_path / "metrics.jsonl", Clock()
    file = KeptFile(path, size=0, now=clock)
    file.write(row(1))
    with disk_takes(room, tmp_path, code):
        for step in (2, 3, 4, 5):
            clock.seconds += 2 * AGAIN_S
            file.write(row(step))
            assert path.read_bytes().endswith(b"\n")  # a killed run leaves whole rows
    assert steps(path) == list(range(1, 2 + room // len(row(1))))
    clock.seconds += 2 * AGAIN_S
    file.write(row(6))
    file.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    told, back = (record.getMessage() for record in caplog.records)  # once, not at every row
    assert told.startswith(f"{path}: {os.strerror(code)} ({errno.errorcode[code]})")
    assert "hydra.run.dir" in told
    assert "written again after" in back


def test_a_full_disk_is_not_asked_at_every_row(tmp_path: Path) -> None:
    path, clock = tmp_path / "rows", Clock()
    file = KeptFile(path, size=0, now=clock)
    with disk_takes(0, tmp_path):
        file.write(row(1))
    file.write(row(2))
    assert path.read_bytes() == b""
    clock.seconds += AGAIN_S
    file.write(row(3))
    assert steps(path) == [1, 2, 3]


def test_what_waits_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_file, "MOST_BYTES", 80)
    file = KeptFile(tmp_path / "rollouts.jsonl", size=0)
    with disk_takes(0, tmp_path):
        for step in (1, 2):
            file.write(row(step))
        with pytest.raises(DiskError, match=r"rollouts\.jsonl: 99 bytes wait.*hydra\.run\.dir"):
            file.write(row(3))


def test_a_file_that_cannot_be_opened_is_told_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl: Is a directory \(EISDIR\); name a folder .* hydra\.run\.dir"):
        KeptFile(tmp_path / "metrics.jsonl", size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"hydra\.run\.dir"):
        open_after(tmp_path / "file" / "metrics.jsonl", None)


@pytest.mark.parametrize("on_disk", [[1, 2], [1, 2, 3, 4, 5], [1, 2, 3]])
def test_a_resumed_run_writes_what_its_checkpoint_kept(tmp_path: Path, on_disk: list[int]) -> None:
    """Rows 3 to 5 waited when the checkpoint of step 4 was written; some of them may have been written after it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(row(step) for step in on_disk))
    file = open_after(path, 4, unwritten=row(3) + row(4) + row(5))
    file.write(row(5))
    file.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_in_another_folder_a_resumed_run_begins_with_the_next_step(tmp_path: Path) -> None:
    file = open_after(tmp_path / "metrics.jsonl", 4, unwritten=row(3) + row(4))
    file.write(row(5))
    file.close()
    assert steps(tmp_path / "metrics.jsonl") == [5]
