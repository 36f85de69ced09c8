"""What is checked before Ray starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from rlxf.core.errors import PlacementError
from tests.disks import fill, small_disk
from workers.cluster import require_room


def test_a_temporary_folder_with_room_is_left_as_it_was(tmp_path: Path) -> None:
    require_room(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_folder_is_told_with_rays_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        PlacementError, match=rf"{re.escape(str(tmp_path))}: 1,000 bytes are free.*RAY_TMPDIR.*--temp-dir"
    ):
        require_room(tmp_path)


def test_a_folder_that_cannot_be_written_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"nowhere: No such file or directory; .*RAY_TMPDIR"):
        require_room(tmp_path / "nowhere")


def test_a_disk_without_any_room_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        with pytest.raises(PlacementError, match=r"disk: No space left on device; .*RAY_TMPDIR"):
            require_room(disk)
