"""Every kind of damage is seen and named, and the newest whole checkpoint is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlxf.checkpoint import MANIFEST, find_problems, list_checkpoints, newest_good, prune, require_good, write_manifest
from rlxf.errors import CheckpointError


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"iter_{step:07d}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "__0_0.distcp").write_bytes(bytes(range(256)) * step)
    (folder / "driver.json").write_text('{"step": 1}')
    write_manifest(folder)
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = ["shards/__0_0.distcp", "driver.json", MANIFEST]
DAMAGES: list[Callable[[Path], None]] = [truncate, empty, flip_one_bit, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_to_every_file_is_seen_and_the_previous_checkpoint_is_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    good, broken = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert newest_good(tmp_path) == (broken, [])
    damage(broken / name)
    found, damaged = newest_good(tmp_path)
    assert found == good
    assert [item.folder for item in damaged] == [broken]
    # A broken manifest may show as its own damage or as a file that no longer fits it.
    assert name == MANIFEST or name in str(damaged[0])
    with pytest.raises(CheckpointError, match="iter_0000020"):
        require_good(broken)


def test_none_good_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    flip_one_bit(checkpoint(tmp_path, 10) / "driver.json")
    with pytest.raises(CheckpointError, match=r"iter_0000010: driver.json .*\n.*training.resume=never"):
        newest_good(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / ".iter_0000010.tmp").mkdir()  # what a killed save leaves
    assert newest_good(tmp_path) == (None, [])
    assert newest_good(tmp_path / "nowhere") == (None, [])


def test_an_extra_file_does_no_harm(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "notes.txt").write_text("mine")
    assert find_problems(folder) == []


def test_order_is_by_number_not_by_name(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (20, 9, 10_000_000)]
    assert list_checkpoints(tmp_path) == [folders[1], folders[0], folders[2]]


def test_pruning_keeps_the_newest_and_touches_nothing_else(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (10, 20, 30, 40)]
    (tmp_path / "iter_0000005").mkdir()  # no manifest: not ours
    outside = checkpoint(tmp_path / "elsewhere", 1)
    (tmp_path / "iter_0000001").symlink_to(outside)
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 2, keep=frozenset({folders[0]})) == [folders[1]]
    assert list_checkpoints(tmp_path)[-3:] == [folders[0], folders[2], folders[3]]
    assert outside.is_dir()
    assert (tmp_path / "iter_0000005").is_dir()
