"""Faults as rows of ``events.jsonl``."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import ConfigError, RlxfError, RunInterrupted, StopRequested, WorkerLost
from rlxf.core.events import NAME, event, recorded_events
from rlxf.observe.formulas import read_jsonl
from tests.disks import disk_takes

log = logging.getLogger("rlxf.test_events")


@pytest.fixture(autouse=True)
def _all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def test_a_row_holds_what_was_known_and_the_line_for_people(tmp_path: Path) -> None:
    with recorded_events(tmp_path):
        log.warning("lost %s", "ref rank 0", extra=event("lost", who="ref rank 0", phase="ref", step=3))
        log.info("it is back", extra=event("recovered", who="ref rank 0", step=3, seconds=1.23456, steps_lost=0))
    lost, back = rows(tmp_path)
    assert datetime.fromisoformat(str(lost.pop("time"))).utcoffset() is not None
    assert lost == {"event": "lost", "who": "ref rank 0", "phase": "ref", "step": 3, "message": "lost ref rank 0"}
    assert datetime.fromisoformat(str(back.pop("time"))) is not None
    assert back == {
        "event": "recovered",
        "who": "ref rank 0",
        "step": 3,
        "seconds": 1.235,
        "steps_lost": 0,
        "message": "it is back",
    }


def test_a_run_without_events_has_no_file(tmp_path: Path) -> None:
    with recorded_events(tmp_path):
        log.warning("nothing but a line")
    log.warning("after the run", extra=event("lost"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_whole_rows_and_loses_none(tmp_path: Path) -> None:
    with recorded_events(tmp_path):
        log.warning("lost", extra=event("lost", step=1))
        with disk_takes(20, tmp_path):  # a part of a row
            log.warning("no room", extra=event("disk", who="metrics.jsonl"))
            assert [row["event"] for row in rows(tmp_path)] == ["lost"]
        log.warning("room again", extra=event("disk is back", who="metrics.jsonl"))
    assert [row["event"] for row in rows(tmp_path)] == ["lost", "disk", "disk is back"]


def test_rows_of_a_run_that_goes_on_are_added(tmp_path: Path) -> None:
    for step in (1, 2):
        with recorded_events(tmp_path):
            log.warning("lost", extra=event("lost", step=step))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_disk_that_takes_no_row_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with recorded_events(tmp_path / "gone"):
        log.warning("lost", extra=event("lost"))
    assert caplog.messages == ["lost"]


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (WorkerLost("lost ref rank 0"), {"event": "ended", "exit_code": 1, "step": 4, "message": "lost ref rank 0"}),
        (RunInterrupted("need 4 NPU"), {"event": "ended", "exit_code": 75, "step": 4, "message": "need 4 NPU"}),
        (StopRequested("stopped"), None),
        (ConfigError("training.lr: expected a number"), None),
    ],
)
def test_the_fault_that_ends_a_run_is_a_row(tmp_path: Path, error: RlxfError, row: dict[str, Any] | None) -> None:
    error.complete_steps = 3
    with pytest.raises(type(error)), recorded_events(tmp_path):
        raise error
    found = read_jsonl(tmp_path / "events.jsonl") if row else []
    assert [{key: value for key, value in item.items() if key != "time"} for item in found] == ([row] if row else [])
    assert (tmp_path / "events.jsonl").exists() is (row is not None)
