"""A due checkpoint is hashed, named and pruned by a thread while the run samples: what the run sees of it, and when."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlxf.checkpointing import run_folder
from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.rolling import rolling_steps
from rlxf.checkpointing.run_folder import RunFolder
from rlxf.checkpointing.store import LATEST, list_checkpoints, step_of
from rlxf.core.disk import PATIENCE_S
from rlxf.core.errors import CheckpointError, SaveError
from rlxf.core.types import Metrics, ReferencedPairs
from rlxf.driver import train
from rlxf.loop.run import State
from tests.unit.small_run import SmallActor, small_config, small_run

FULL = OSError(errno.ENOSPC, "No space left on device")


class Held:
    """A step of publishing that waits until it may go on, and then fails as often as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.go, self.failures, self.threads = threading.Event(), 0, list[str]()
        whole: Callable[..., Any] = getattr(run_folder, name)

        def held(*args: Any, **options: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            assert self.go.wait(60)
            if self.failures:
                self.failures -= 1
                raise FULL
            return whole(*args, **options)

        monkeypatch.setattr(run_folder, name, held)


class Publishing:
    """A run folder, and what it told; a thread that waits takes no time."""

    def __init__(self, run_dir: Path, **training: object) -> None:
        self.config = small_config(
            **{f"training__{key}": value for key, value in {"train_iters": 99, **training}.items()}
        )
        self.root, self.seconds, self.told = run_dir / "checkpoints", 0.0, list[int]()
        self.pauses: list[float] = []
        self.folder = RunFolder(
            self.config, run_dir, SmallActor(self.config, []),
            saved=lambda folder: self.told.append(step_of(folder)), now=lambda: self.seconds, sleep=self.pauses.append,
        )  # fmt: skip

    @property
    def steps(self) -> list[int]:
        return [step_of(path) for path in list_checkpoints(self.root)]


@pytest.fixture
def manifest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch, "write_manifest")
    yield held
    held.go.set()


def test_the_run_goes_on_while_it_is_published(tmp_path: Path, manifest: Held) -> None:
    run = Publishing(tmp_path)
    run.folder.save_due(State(step=1))
    run.folder.poll()
    assert (run.steps, run.told, run.folder.newest(), run.folder.is_publishing) == ([], [], None, True)
    manifest.go.set()
    run.folder.published()
    assert (run.steps, run.told, run.folder.is_publishing) == ([1], [1], False)
    assert find_problems(run.root / "iter_0000001") == []
    assert manifest.threads == ["publish"]


def test_old_checkpoints_are_deleted_by_the_same_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruning = Held(monkeypatch, "prune")
    run = Publishing(tmp_path, keep_latest=1)
    for step in (1, 2):
        run.folder.save_due(State(step=step))
        pruning.go.set()
        run.folder.published()
    assert run.steps == [2]
    assert pruning.threads == ["publish"] * 2


def test_the_last_save_of_a_run_is_there_when_it_returns(tmp_path: Path, manifest: Held) -> None:
    """Also if the one that was due before it is still on its way."""
    run = Publishing(tmp_path)
    run.folder.save_due(State(step=1))
    manifest.go.set()
    run.folder.save_checkpoint(State(step=2))
    assert run.steps == run.told == [1, 2]
    assert not run.folder.is_publishing


def test_a_disk_that_is_full_for_seconds_is_waited_for_in_the_thread(tmp_path: Path, manifest: Held) -> None:
    run = Publishing(tmp_path)
    manifest.failures = 3
    manifest.go.set()
    run.folder.save_due(State(step=1))
    run.folder.published()
    assert run.steps == [1]
    assert 0 < sum(run.pauses) < PATIENCE_S


def test_a_tracker_that_cannot_be_written_at_first_does_not_write_the_checkpoint_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, manifests = Held(monkeypatch, "write_text"), Held(monkeypatch, "write_manifest")
    tracker.failures = 1
    tracker.go.set()
    manifests.go.set()
    run = Publishing(tmp_path)
    run.folder.save_due(State(step=1))
    run.folder.published()
    assert run.told == run.steps == [1]
    assert (run.root / LATEST).read_text() == "1\n"
    assert len(manifests.threads) == 1


@pytest.mark.parametrize("asks", ["published", "poll", "save_due"])
def test_a_failure_is_told_at_the_next_boundary_and_counted(
    tmp_path: Path, manifest: Held, caplog: pytest.LogCaptureFixture, asks: str
) -> None:
    run = Publishing(tmp_path, max_failed_saves=1)
    manifest.failures = 1000
    manifest.go.set()
    run.folder.save_due(State(step=1))
    _publisher_has_ended()
    if asks != "save_due":
        getattr(run.folder, asks)()
    run.folder.save_due(State(step=2))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the checkpoint could not be written: " in told
    assert "(ENOSPC)" in told
    assert "(1 in a row, training.max_failed_saves = 1); the run goes on" in told
    _publisher_has_ended()
    with pytest.raises(SaveError, match="2 in a row"):
        run.folder.poll()
    assert run.steps == []
    assert not [path for path in run.root.iterdir() if path.name.endswith(".tmp")]


def _publisher_has_ended() -> None:
    for thread in threading.enumerate():
        if thread.name == "publish":
            thread.join(60)


def test_one_that_nobody_asked_for_is_not_counted(
    tmp_path: Path, manifest: Held, caplog: pytest.LogCaptureFixture
) -> None:
    run = Publishing(tmp_path, max_failed_saves=0, save_every_minutes=1)
    run.seconds += 60
    manifest.failures = 1000
    manifest.go.set()
    run.folder.save_in_time(State(step=1))
    run.folder.published()
    assert [record.getMessage().split(" (")[-1] for record in caplog.records] == [
        "training.save_every_minutes = 1; 0 = off)"
    ]
    manifest.failures = 0
    run.seconds += 60
    run.folder.save_in_time(State(step=2))
    run.folder.published()
    assert run.steps == [2]
    assert rolling_steps(run.root) == {2}


def test_a_disk_that_hangs_is_told_without_waiting_for_it(tmp_path: Path, manifest: Held) -> None:
    run = Publishing(tmp_path, stage_timeout_s=100)
    run.folder.save_due(State(step=1))
    run.seconds += 99
    run.folder.poll()
    run.seconds += 1
    with pytest.raises(CheckpointError, match=r"iter_0000001: was not written within 100 s.*training\.stage_timeout_s"):
        run.folder.poll()


def test_a_run_that_fails_meanwhile_waits_for_it(tmp_path: Path, manifest: Held, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    run = Publishing(tmp_path)
    run.folder.save_due(State(step=1))
    manifest.go.set()
    run.folder.finish(ask_actor=False)
    assert run.folder.newest() == run.root / "iter_0000001"
    assert not caplog.records


def test_an_update_begins_when_the_checkpoint_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_run(small_config(training__save_interval=1))
    order: list[str] = []
    save, update = small.folder.save_due, small.actor.update

    def saves(state: State) -> None:
        small.folder.is_publishing = True
        save(state)

    def published() -> None:
        order.append("published")
        small.folder.is_publishing = False

    def updates(batch: ReferencedPairs, step: int) -> Metrics:
        order.append("update")
        return update(batch, step)

    monkeypatch.setattr(small.folder, "save_due", saves)
    monkeypatch.setattr(small.folder, "published", published)
    monkeypatch.setattr(small.actor, "update", updates)
    train(small.run)
    assert order == ["update", *["published", "update"] * 3]
