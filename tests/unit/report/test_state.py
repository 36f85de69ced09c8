"""Whether a run goes on, how it ended, what is left of it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from benchmarks.made_run import Made, make_run
from rlxf.report.read import read_run
from rlxf.report.state import State, state_of


def state(folder: Path, *, alive: bool | None = None) -> State:
    run = read_run(folder)
    return state_of(run, now=run.changed_at + 3600, alive=alive)


def add(folder: Path, name: str, **row: object) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_a_run_that_ended_well_is_known_by_its_journal_or_by_its_summary(tmp_path: Path) -> None:
    found = state(make_run(tmp_path / "new", Made(steps=20)))
    assert (found.word, found.step, found.num_steps, found.seconds_left, found.seconds) == ("ended", 20, 20, None, 40.0)
    assert state(make_run(tmp_path / "old", Made(steps=20, extras=False))).word == "ended"


@pytest.mark.parametrize(
    ("code", "word"), [(0, "ended"), (130, "stopped"), (143, "stopped"), (1, "failed"), (75, "failed")]
)
def test_the_journal_names_the_end(tmp_path: Path, code: int, word: str) -> None:
    make_run(tmp_path, Made(steps=20, ends=False))
    add(tmp_path, "run.jsonl", what="ended", step=20, exit_code=code, message="engine 1 is gone")
    found = state(tmp_path)
    assert found.word == word
    assert found.text == "engine 1 is gone"
    assert found.seconds_left is None


def test_a_run_that_was_resumed_is_not_ended_by_its_earlier_end(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=20, ends=False))
    add(tmp_path, "run.jsonl", what="ended", step=20, exit_code=1, message="lost")
    add(tmp_path, "run.jsonl", what="started", step=20, num_steps=80)
    assert state(tmp_path, alive=True).word == "running"
    assert state(tmp_path).word == "killed"


def test_an_old_run_that_failed_is_known_by_its_event(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=20, num_steps=40, extras=False, ends=False))
    add(tmp_path, "events.jsonl", event="ended", step=21, exit_code=1, message="infer rank 0 died")
    assert state(tmp_path).text == "infer rank 0 died"
    add(tmp_path, "metrics.jsonl", step=21)
    assert state(tmp_path).word == "killed", "it was resumed after the failure"


def test_files_that_change_are_of_a_run_that_goes_on(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, Made(steps=20, num_steps=80, ends=False)))
    assert state_of(run, now=run.changed_at + 10).word == "running"
    assert state_of(run, now=run.changed_at + 600).word == "killed"
    assert state_of(run, now=run.changed_at + 600, alive=True).word == "running"
    assert state_of(run, now=run.changed_at + 1, alive=False).word == "killed"


def test_time_left_is_the_pace_of_the_newest_steps(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=20, num_steps=80, ends=False))
    rows = [json.dumps({"step": step, "timing/all": 5.0 if step <= 20 else 2.0}) for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    found = state(tmp_path, alive=True)
    assert found.seconds_left == pytest.approx(40 * 2.0)
    assert found.seconds == pytest.approx(20 * 5.0 + 20 * 2.0)


def test_the_lock_of_the_checkpoints_shows_a_run_that_is_silent(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=20, num_steps=80, ends=False))
    lock = tmp_path / "checkpoints" / ".lock"
    lock.parent.mkdir()
    with lock.open("w") as file:
        assert state(tmp_path).word == "killed"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state(tmp_path).word == "running"
    os.utime(lock)
    assert state(tmp_path).word == "killed"
