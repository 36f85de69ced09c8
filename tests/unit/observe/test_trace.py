"""``trace.json``: rows and boxes, and a file that opens wherever it ends."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlxf.core import kept_file
from rlxf.core.clock import Clock, Span
from rlxf.core.errors import DataError
from rlxf.observe.trace import Trace
from tests.disks import disk_takes
from tests.traces import Box, overlaps, read_boxes, read_events


def shape(boxes: list[Box]) -> list[tuple[str, str, int, int | None]]:
    return [(box.row, box.stage, box.step, box.version) for box in boxes]


def seconds(boxes: list[Box]) -> list[float]:
    return [(box.end - box.begin) / 1e6 for box in boxes]


def write_some(path: Path, **options: Any) -> None:
    trace = Trace(path, **options)
    for step in (1, 2):
        trace.call("infer rank 1 on node a", Span("gen", step, step - 1, step + 0.0, step + 0.5))
        trace.stage(Span("gen", step, step - 1, step + 0.0, step + 0.6), ("infer",))
    trace.close()


SOME = [
    ("infer rank 1", "gen", 1, 0),
    ("driver", "gen", 1, 0),
    ("infer rank 1", "gen", 2, 1),
    ("driver", "gen", 2, 1),
]


def test_every_worker_has_a_row_and_every_stage_a_box(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_some(path)
    assert shape(read_boxes(path)) == SOME
    assert seconds(read_boxes(path)) == pytest.approx([0.5, 0.6, 0.5, 0.6], abs=2e-6)


def test_rows_are_grouped_and_ordered_by_role(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for worker in ("reward rank 0", "train rank 1", "infer rank 0", "ref rank 0", "train rank 0"):
        trace.call(worker, Span("start", 0, None, 1.0, 2.0))
    trace.close()
    events = read_events((tmp_path / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    order = {event["pid"]: event["args"]["sort_index"] for event in events if event["name"] == "process_sort_index"}
    assert [names[pid] for pid in sorted(names, key=lambda pid: order[pid])] == ["train", "infer", "ref", "reward"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert len(threads) == 5
    assert sum("version" in event["args"] for event in events if event["ph"] == "X") == 0


def test_times_are_the_wall_clocks(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    now = time.time()
    begin = time.perf_counter()
    trace.stage(Span("save", 1, 0, begin, begin + 1.0), ())
    trace.close()
    (box,) = read_boxes(tmp_path / "trace.json")
    assert box.begin / 1e6 == pytest.approx(now, abs=0.5)


def test_roles_of_this_process_have_rows_of_their_own(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", role_rows=True)
    trace.stage(Span("sync", 3, 2, 1.0, 2.0), ("train", "infer"))
    trace.close()
    rows = [box.row for box in read_boxes(tmp_path / "trace.json")]
    assert rows == ["driver", "train rank 0", "infer rank 0"]


def test_calls_of_a_stage_that_follow_each_other_are_one_box(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for begin, end in ((1.0, 1.2), (1.0, 1.4), (1.401, 1.6), (1.7, 1.8)):  # the second waited for the first
        trace.call("infer rank 0", Span("sync", 2, 1, begin, end))
    trace.call("infer rank 0", Span("gen", 3, 1, 1.801, 2.0))
    trace.close()
    boxes = read_boxes(tmp_path / "trace.json")
    assert [box.stage for box in boxes] == ["sync", "sync", "gen"]
    assert seconds(boxes) == pytest.approx([0.6, 0.1, 0.199], abs=2e-6)


def test_boxes_of_a_row_never_overlap(tmp_path: Path) -> None:
    """A call stands in the queue of its worker while the one before runs."""
    trace = Trace(tmp_path / "trace.json")
    for stage, begin, end in (("gen", 1.0, 3.0), ("sync", 2.0, 4.0), ("eval", 3.5, 3.9)):
        trace.call("infer rank 0", Span(stage, 1, 0, begin, end))
    trace.close()
    boxes = read_boxes(tmp_path / "trace.json")
    assert overlaps(boxes) == []
    assert seconds(boxes) == pytest.approx([2.0, 1.0, 0.0], abs=2e-6)


def test_what_is_no_worker_and_a_stage_with_nothing_to_do_have_no_box(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", role_rows=True)
    trace.call("the trainer", Span("save", 1, 0, 1.0, 2.0))
    trace.stage(Span("eval", 1, 1, 1.0, 1.000_002), ("infer",))
    trace.close()
    assert read_boxes(tmp_path / "trace.json") == []


def test_a_thread_that_waits_for_a_role_has_a_row_of_its_own(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    clock = Clock(("infer",), trace)

    def sample() -> None:
        with clock("gen", step=1, version=0):
            time.sleep(0.03)

    thread = threading.Thread(target=sample, name="infer")
    clock.start(0)
    with clock("sync", version=0):
        thread.start()
        thread.join()
    trace.close()
    boxes = read_boxes(tmp_path / "trace.json")
    assert shape(boxes) == [("driver, waits for infer", "gen", 2, 0), ("driver", "sync", 1, 0)]


def test_what_has_ended_is_in_the_file_at_once(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.call("infer rank 0", Span("gen", 1, 0, 1.0, 2.0))
    trace.stage(Span("gen", 1, 0, 1.0, 2.1), ())
    assert len(read_boxes(tmp_path / "trace.json")) == 2  # not closed: the process is killed here
    trace.close()
    trace.close()


def test_every_beginning_of_the_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_some(path)
    text = path.read_text()
    for end in range(len(text) + 1):
        assert len(read_events(text[:end])) in (text[:end].count("\n") - 1, text[:end].count("\n"))
    assert json.loads(text.rstrip().rstrip(",") + "]") == read_events(text)  # as docs/metrics.md says


@pytest.mark.parametrize("ending", ["", '{"ph":"X","pid":1,"args":{"step":1}', "]", "]\n", "\n", "\n]\n"])
def test_a_resumed_run_goes_on_in_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "trace.json"
    write_some(path)
    path.write_text(path.read_text() + ending)
    write_some(path, append=True)
    assert shape(read_boxes(path)) == SOME + SOME
    assert json.loads(path.read_text().rstrip().rstrip(",") + "]")


def test_a_resumed_run_goes_on_wherever_a_kill_cut_the_file(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.json", tmp_path / "trace.json"
    write_some(whole)
    for end in range(len(whole.read_text()) + 1):
        path.write_text(whole.read_text()[:end])
        before = path.read_text().count("},\n")
        write_some(path, append=True)
        assert (
            json.loads(path.read_text().rstrip().rstrip(",") + "]")[:before] == read_events(whole.read_text())[:before]
        )
        assert shape(read_boxes(path))[-4:] == SOME


def test_an_array_that_somebody_closed_by_hand_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_some(path)
    path.write_text(path.read_text().rstrip().rstrip(",") + "\n]\n")
    json.loads(path.read_text())
    write_some(path, append=True)
    assert shape(read_boxes(path)) == SOME + SOME


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_some(path)
    write_some(path)
    assert shape(read_boxes(path)) == SOME


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": []}\n')
    with pytest.raises(DataError, match=r"trace\.json: is no trace of a run, so .* move it away"):
        Trace(path, append=True)
    assert path.read_text() == '{"traceEvents": []}\n'


def test_boxes_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for step in range(4):
        with disk_takes(0 if step in (1, 2) else None, tmp_path):
            trace.stage(Span("gen", step, 0, step + 1.0, step + 1.5), ())
    trace.close()
    assert [box.step for box in read_boxes(tmp_path / "trace.json")] == [0, 1, 2, 3]


def test_a_disk_that_stays_full_ends_the_trace_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_file, "MOST_BYTES", 1000)
    trace = Trace(tmp_path / "trace.json")
    with caplog.at_level(logging.WARNING), disk_takes(0, tmp_path):
        for step in range(100):
            trace.stage(Span("gen", step, 0, step + 1.0, step + 1.5), ())
        trace.close()
    first, ended, lost = (record.getMessage() for record in caplog.records)
    assert "trace.json: No space left on device (ENOSPC)" in first
    assert "bytes wait to be written" in ended
    assert ended.endswith("; the run goes on without it")
    assert "could not be written" in lost
