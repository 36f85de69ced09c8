"""Who does the work: this thread, or one for each lane, which leaves when nobody needs it any more."""

from __future__ import annotations

import threading
import time

import pytest

from rlxf.core.stop import Stop
from rlxf.schedule import InThreads, OneAfterTheOther


def fail() -> None:
    raise ValueError("broken")


def test_one_after_the_other_has_done_it_when_it_returns() -> None:
    lanes = OneAfterTheOther()
    future = lanes.start("ref", threading.current_thread)
    assert future.done()
    assert future.result() is threading.current_thread()
    with pytest.raises(ValueError, match="broken"):
        lanes.start("ref", fail).result()


def test_threads_work_at_the_same_time_and_are_named_by_their_lanes() -> None:
    lanes, both = InThreads(Stop()), threading.Barrier(2)

    def work() -> str:
        both.wait(timeout=10)
        return threading.current_thread().name

    futures = [lanes.start(lane, work) for lane in ("infer", "train")]
    assert [future.result(timeout=10) for future in futures] == ["infer", "train"]
    with pytest.raises(ValueError, match="broken"):
        lanes.start("ref", fail).result(timeout=10)


def test_waiting_ends_with_the_first() -> None:
    lanes, release = InThreads(Stop()), threading.Event()
    slow = lanes.start("infer", lambda: release.wait(10) and None)
    fast = lanes.start("ref", lambda: None)
    lanes.wait([slow, fast])
    assert (slow.done(), fast.done()) == (False, True)
    release.set()
    lanes.wait([slow])
    assert slow.done()


def test_work_that_is_not_needed_any_more_gives_up_and_this_thread_does_not() -> None:
    stop = Stop()
    lanes = InThreads(stop)

    def work() -> str:
        deadline = time.monotonic() + 10
        while not stop.must_give_up():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return "gave up"

    future = lanes.start("infer", work)
    assert not stop.must_give_up()
    lanes.close()
    assert future.result(timeout=0) == "gave up"  # closing waits for it
    assert not stop.must_give_up()
