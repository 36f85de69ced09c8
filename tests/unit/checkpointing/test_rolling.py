"""Checkpoints that are written because minutes have passed: the next one of any kind replaces them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from rlxf.checkpointing.resume import find_resume
from rlxf.checkpointing.rolling import rolling_steps
from rlxf.checkpointing.run_folder import RunFolder
from rlxf.checkpointing.store import list_checkpoints, step_of
from rlxf.loop.run import State
from tests.unit.small_run import SmallActor, small_config

MINUTE = 60.0


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Rolling:
    """A run that takes a minute a step."""

    def __init__(self, run_dir: Path, **changes: object) -> None:
        training = {"training__save_every_minutes": 3, "training__train_iters": 100}
        self.config = small_config(**{**training, **changes})
        self.run_dir, self.clock = run_dir, Clock()
        self.folder = RunFolder(self.config, run_dir, SmallActor(self.config, []), describe=describe, now=self.clock)

    def step(self, step: int) -> list[int]:
        """The checkpoints after that step."""
        self.clock.seconds += MINUTE
        state = State(step=step, policy_version=step, metrics={"eval/reward": float(-step)})
        interval = self.config.training.save_interval
        if interval and step % interval == 0:
            self.folder.save_checkpoint(state)
        else:
            self.folder.save_in_time(state)
        self.folder.wait()
        return self.steps

    @property
    def steps(self) -> list[int]:
        return [step_of(path) for path in list_checkpoints(self.run_dir / "checkpoints")]


def describe(state: State) -> dict[str, object]:
    return {"prompt_ids": [state.step], "report": {"start": {}, "end": {}}, "baseline": None}


@pytest.mark.parametrize("background", [False, True])
def test_after_so_many_minutes_there_is_one_and_it_is_the_only_one(tmp_path: Path, background: bool) -> None:
    run = Rolling(tmp_path, training__async_save=background)
    assert [run.step(step) for step in range(1, 8)] == [[], [], [3], [3], [3], [6], [6]]
    assert rolling_steps(tmp_path / "checkpoints") == {6}


def test_a_checkpoint_of_the_interval_replaces_it_and_begins_the_minutes_anew(tmp_path: Path) -> None:
    run = Rolling(tmp_path, training__save_interval=5)
    assert [run.step(step) for step in range(1, 10)] == [[], [], [3], [3], [5], [5], [5], [5, 8], [5, 8]]
    assert run.step(10) == [5, 10]
    assert rolling_steps(tmp_path / "checkpoints") == frozenset()


def test_it_counts_neither_as_one_of_the_newest_nor_as_the_best(tmp_path: Path) -> None:
    """The reward falls, so the oldest is the best; at step 3 the rolling one would be it."""
    run = Rolling(tmp_path, training__save_interval=5, training__keep_latest=1, training__keep_best=1)
    run.step(3)
    run.clock.seconds += 10 * MINUTE
    run.step(4)
    assert run.steps == [4]
    assert not (tmp_path / "checkpoints" / "best_checkpointed_iteration.txt").exists()
    for step in range(5, 11):
        run.step(step)
    assert run.steps == [5, 10]  # the best, and the newest
    assert [run.step(step) for step in (11, 12, 13)][-1] == [5, 10, 13]
    assert (tmp_path / "checkpoints" / "best_checkpointed_iteration.txt").read_text() == "5\n"


def test_the_end_of_a_run_makes_it_one_that_stays(tmp_path: Path) -> None:
    run = Rolling(tmp_path)
    run.clock.seconds = 10 * MINUTE
    assert run.step(1) == [1]
    run.folder.save_checkpoint(State(step=1, policy_version=1))
    assert run.steps == [1]
    assert rolling_steps(tmp_path / "checkpoints") == frozenset()
    run.folder.save_checkpoint(State(step=2, policy_version=2))
    assert run.steps == [1, 2]


def test_none_is_made_at_the_last_step_or_when_switched_off(tmp_path: Path) -> None:
    run = Rolling(tmp_path / "off", training__save_every_minutes=0)
    run.clock.seconds = 1000 * MINUTE
    assert run.step(7) == []
    last = Rolling(tmp_path / "last", training__train_iters=7)
    last.clock.seconds = 1000 * MINUTE
    assert last.step(7) == []


def test_a_resumed_run_goes_on_from_it_and_replaces_it(tmp_path: Path) -> None:
    run = Rolling(tmp_path)
    for step in (1, 2, 3):
        run.step(step)
    resume = find_resume(run.config, tmp_path)
    assert resume is not None
    assert resume.state.step == 3
    again = Rolling(tmp_path)
    assert again.step(4) == [3]
    again.folder.save_checkpoint(State(step=5, policy_version=5))
    assert again.steps == [5]


def test_a_full_disk_does_not_end_a_run_that_asked_for_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Rolling(tmp_path)
    run.clock.seconds = 10 * MINUTE
    assert run.step(1) == [1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    run.clock.seconds += 10 * MINUTE
    with caplog.at_level(logging.WARNING):
        assert run.step(2) == [1]
        run.step(3)
    assert len(caplog.records) == 1  # and not one at every step
    assert "training.save_every_minutes = 3" in caplog.text
