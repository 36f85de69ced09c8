"""Every kind of damage is seen and named, and the newest whole checkpoint is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlxf.checkpointing.manifest import MANIFEST, find_problems, write_manifest
from rlxf.checkpointing.store import LATEST, PUBLISHED, best, list_checkpoints, newest_good, prune, require_good
from rlxf.core.errors import CheckpointError
from rlxf.core.files import remove_leftovers, temporary_for
from tests.damage import DAMAGES, flip_one_bit


def checkpoint(root: Path, step: int, **metrics: float | None) -> Path:
    folder = root / f"iter_{step:07d}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "__0_0.distcp").write_bytes(bytes(range(256)) * step)
    (folder / "driver.json").write_text(json.dumps({"step": 1, "metrics": metrics}))
    write_manifest(folder)
    return folder


FILES = ["shards/__0_0.distcp", "driver.json", MANIFEST]


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


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    whole = (folder / MANIFEST).read_bytes()
    for position in range(len(whole) * 8):
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        (folder / MANIFEST).write_bytes(content)
        assert find_problems(folder), f"bit {position}"


def test_a_deleted_newest_checkpoint_is_missed(tmp_path: Path) -> None:
    good, gone = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    (tmp_path / LATEST).write_text("20\n")
    shutil.rmtree(gone)
    found, damaged = newest_good(tmp_path)
    assert found == good
    assert "iter_0000020: is missing" in str(damaged[0])
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="iter_0000020: is missing"):
        newest_good(tmp_path)


@pytest.mark.parametrize("content", ["", "\x00\x00", "twenty", "10\n"])
def test_a_tracker_that_says_nothing_new_is_not_asked(tmp_path: Path, content: str) -> None:
    newest = checkpoint(tmp_path, 20)
    (tmp_path / LATEST).write_text(content)
    assert newest_good(tmp_path) == (newest, [])
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="is complete"):  # there was a checkpoint: never a silent start at step 0
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
    assert prune(tmp_path, 0, newest=40) == []
    assert prune(tmp_path, 2, newest=40, keep=frozenset({folders[0]})) == [folders[1]]
    assert list_checkpoints(tmp_path)[-3:] == [folders[0], folders[2], folders[3]]
    assert outside.is_dir()
    assert (tmp_path / "iter_0000005").is_dir()


def test_a_damaged_checkpoint_that_is_newer_saves_no_other_from_being_kept(tmp_path: Path) -> None:
    """The run fell back from 40 to 20, and has just saved 30: that one must stay."""
    folders = [checkpoint(tmp_path, step) for step in (10, 20, 30, 40)]
    assert prune(tmp_path, 1, newest=30) == folders[:2]
    assert list_checkpoints(tmp_path) == folders[2:]


def test_the_best_are_judged_by_their_own_number(tmp_path: Path) -> None:
    values: list[float | None] = [0.5, 2.0, None, -1.0, 2.0]
    folders = [checkpoint(tmp_path, step, reward=value) for step, value in enumerate(values, start=1)]
    checkpoint(tmp_path, 6)  # was not evaluated
    assert best(tmp_path, "reward", 2, largest=True) == [folders[4], folders[1]]
    assert best(tmp_path, "reward", 1, largest=False) == [folders[3]]
    assert best(tmp_path, "loss", 3, largest=True) == []


def test_what_a_killed_run_left_half_done_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    kept = [checkpoint(tmp_path, 1), tmp_path / ".hidden", tmp_path / "iter_0000002.tmp", tmp_path / "hf_0000001"]
    for folder in kept[1:]:
        folder.mkdir()
    (temporary_for(tmp_path / "iter_0000003") / "shard").write_text("half")
    for name in (".iter_0000001.0a1b2c3d.old", ".hf_0000003.4711", ".policy.0a1b2c3d.tmp"):
        (tmp_path / name).mkdir()
    checkpoint(tmp_path, 4).rename(tmp_path / ".iter_0000004.0a1b2c3d.aside")  # its new one did not get the name
    remove_leftovers(tmp_path, PUBLISHED)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "iter_0000004"])
    assert find_problems(tmp_path / "iter_0000004") == []
