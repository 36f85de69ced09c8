"""Folders that a run cannot write when it starts: one line with file, reason and key, and nothing half written."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from rlxf.checkpointing.lock import owned_checkpoints
from rlxf.checkpointing.run_folder import save_config
from rlxf.core.disk import writing
from rlxf.core.errors import DiskError
from rlxf.core.files import write_json, write_text
from tests.disks import FILLER, disk_takes, fill, small_disk
from tests.unit.small_run import small_config


def test_a_folder_of_checkpoints_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiskError, match=r"Not a directory \(ENOTDIR\); .*actor_rollout\.save"),
        owned_checkpoints(tmp_path / "file" / "checkpoints", tmp_path),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_small_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, code: int) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with (
        disk_takes(0, tmp_path, code),
        pytest.raises(DiskError, match=rf"summary\.json.* \({errno.errorcode[code]}\).*hydra\.run\.dir"),
        writing(path, "hydra.run.dir"),
    ):
        write_json(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_on_a_real_disk_too(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_text(disk / "config.yaml", "old")
        fill(disk)
        with (
            pytest.raises(DiskError, match=r"config\.yaml: No space left on device \(ENOSPC\), 0 bytes are free"),
            writing(disk, "hydra.run.dir"),
        ):
            save_config(small_config(), disk)
        assert (disk / "config.yaml").read_text() == "old"
        assert sorted(path.name for path in disk.iterdir()) == ["config.yaml", FILLER]
