"""Checkpoints that the disk does not take: what the run does, what is left, and what is told."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rlxf.checkpointing.rows import load_rows, save_rows
from rlxf.checkpointing.run_folder import AGAIN_S, RunFolder
from rlxf.checkpointing.store import list_checkpoints, newest_good, step_of
from rlxf.core.disk import PATIENCE_S, disk_error
from rlxf.core.errors import CheckpointError, DiskError, SaveError
from rlxf.loop.run import State
from tests.disks import FILLER, fill, small_disk
from tests.unit.small_run import SmallActor, small_config

ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    RuntimeError("basic_ios::clear: iostream error"),
]
LASTING = [OSError(errno.EROFS, "Read-only file system"), OSError(errno.EACCES, "Permission denied")]


class Disk(SmallActor):
    """Its next writes fail, each after half a file."""

    def __init__(self, *failures: Exception | None) -> None:
        super().__init__(small_config(), [])
        self.failures = list(failures)

    def checkpoint_written(self, wait: bool) -> bool:
        if wait and self.failures and (error := self.failures.pop(0)) is not None:
            self._copy[0].write_bytes(b"half")
            raise error
        return super().checkpoint_written(wait)

    def save_hf(self, folder: Path) -> None:
        if self.failures and (error := self.failures.pop(0)) is not None:
            raise error
        super().save_hf(folder)


class Saving:
    """A run folder whose time passes when it waits, and by a minute a step."""

    def __init__(self, run_dir: Path, *failures: Exception | None, **training: object) -> None:
        self.seconds = 0.0
        self.disk = Disk(*failures)
        self.root = run_dir / "checkpoints"
        config = small_config(**{f"training__{key}": value for key, value in {"train_iters": 99, **training}.items()})
        self.folder = RunFolder(config, run_dir, self.disk, now=lambda: self.seconds, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def due(self, step: int) -> None:
        self.seconds += AGAIN_S
        self.folder.save_due(State(step=step))
        self.folder.published()

    @property
    def steps(self) -> list[int]:
        assert not [path for path in self.root.iterdir() if path.name.startswith(".")], "a temporary is left"
        return [step_of(path) for path in list_checkpoints(self.root)]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_disk_that_is_full_for_seconds_is_waited_for(tmp_path: Path, error: Exception) -> None:
    run = Saving(tmp_path, error, error, error)
    run.folder.save_checkpoint(State(step=1))
    assert run.steps == [1]
    assert newest_good(run.root)[0] is not None
    assert 0 < run.seconds < PATIENCE_S


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_a_folder_that_cannot_be_written_is_not_waited_for(tmp_path: Path, error: Exception) -> None:
    run = Saving(tmp_path, error)
    with pytest.raises(SaveError, match=r"checkpoints: .*; name a folder that can be written in hydra\.run\.dir"):
        run.folder.save_checkpoint(State(step=1))
    assert run.seconds == 0.0


def test_a_run_goes_on_without_a_few_checkpoints_and_then_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Saving(tmp_path, None, *[LASTING[0]] * 2, None, *[LASTING[0]] * 3)
    for step in range(1, 7):
        run.due(step)
    assert run.steps == [1, 4]  # a good one begins the count anew
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert "(ENOSPC)" not in told[0]
    assert "(1 in a row, training.max_failed_saves = 2); the run goes on" in told[0]
    with pytest.raises(SaveError, match=r"3 in a row, training\.max_failed_saves = 2"):
        run.due(7)
    assert newest_good(run.root) == (run.root / "iter_0000004", [])


def test_with_no_failure_allowed_the_first_ends_the_run(tmp_path: Path) -> None:
    run = Saving(tmp_path, LASTING[0], max_failed_saves=0)
    with pytest.raises(SaveError, match="1 in a row"):
        run.due(1)


def test_after_a_failure_it_is_tried_again_in_a_minute(tmp_path: Path) -> None:
    run = Saving(tmp_path, *[ERRORS[0]] * 20, save_every_minutes=0)
    run.due(1)
    assert not run.folder.is_time_to_save(State(step=2))
    run.seconds += AGAIN_S
    assert run.folder.is_time_to_save(State(step=2))
    run.folder.save_in_time(State(step=2))  # still full, and nobody waits here
    assert run.steps == []
    run.disk.failures.clear()
    run.seconds += AGAIN_S
    run.folder.save_in_time(State(step=3))
    run.folder.published()
    assert run.steps == [3]
    assert not run.folder.is_time_to_save(State(step=4))


def test_a_checkpoint_in_the_background_that_fails_is_one_of_them(tmp_path: Path) -> None:
    run = Saving(tmp_path, ERRORS[0], async_save=True, max_failed_saves=1)
    run.folder.save_due(State(step=1))
    run.folder.save_due(State(step=2))  # waits for the one before, which fails
    run.folder.wait()
    assert run.steps == [2]


def test_what_waiting_cannot_mend_ends_the_run_at_once(tmp_path: Path) -> None:
    run = Saving(tmp_path, CheckpointError("a column holds a set"))
    with pytest.raises(CheckpointError, match="a column holds a set"):
        run.due(1)
    assert run.seconds == AGAIN_S  # the step's
    assert run.steps == []


def test_an_export_is_waited_for_too(tmp_path: Path) -> None:
    run = Saving(tmp_path, ERRORS[2], ERRORS[0], None, LASTING[1])
    run.folder.save_hf(1)
    assert (run.root / "hf_0000001").is_dir()
    with pytest.raises(DiskError, match=r"policy: Permission denied \(EACCES\); .* hydra\.run\.dir"):
        run.folder.save_policy()


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch")], ids=repr)
def test_other_errors_are_not_the_disks(tmp_path: Path, error: Exception) -> None:
    assert disk_error(error, tmp_path) is None


def test_rows_that_wait_are_in_the_checkpoint(tmp_path: Path) -> None:
    save_rows(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    rows = {"metrics.jsonl": json.dumps({"step": 1}).encode() + b"\n"}
    save_rows(tmp_path, rows)
    assert load_rows(tmp_path) == rows


def test_on_a_real_disk_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        run = Saving(disk / "run")
        run.folder.save_checkpoint(State(step=1))
        fill(disk)
        with pytest.raises(SaveError, match=r"a checkpoint takes about .* but \S+ are free; make room"):
            run.folder.save_checkpoint(State(step=2))
        assert run.steps == [1]
        assert newest_good(run.root) == (run.root / "iter_0000001", [])
        (disk / FILLER).unlink()
        run.folder.save_checkpoint(State(step=2))
        assert run.steps == [1, 2]
