"""Signals: what the first one cuts and what it lets finish, and that the second one always ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from rlxf.core import stop as stop_module
from rlxf.core.errors import StopRequested
from rlxf.core.stop import Stop


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_without_a_signal_nothing_stops() -> None:
    stop = Stop(interrupt=True)
    with stop.installed(), stop.interruptible():
        stop.check()
    assert not stop.requested
    assert not stop.must_give_up()


def test_a_checkpoint_may_take_longer_than_the_grace_period() -> None:
    stop = Stop(grace_s=0.0)
    with stop.installed():
        send()
        time.sleep(0.01)
        assert stop.must_give_up()
        with stop.uninterruptible():
            assert not stop.must_give_up()
            assert not stop.grace_expired()
        assert stop.must_give_up()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_cuts_abandonable_work_in_this_process(number: int, code: int) -> None:
    stop = Stop(interrupt=True)
    reached: list[str] = []

    def work() -> None:
        with stop.interruptible():
            send(number)
            reached.append("the line after the signal")

    with stop.installed(), pytest.raises(StopRequested, match=signal.Signals(number).name) as caught:
        work()
    assert reached == []
    assert caught.value.exit_code == code


def test_work_that_must_not_be_cut_ends_before_the_run_stops() -> None:
    stop = Stop(interrupt=True)
    finished = False
    with stop.installed():
        send()
        finished = True
        with pytest.raises(StopRequested), stop.interruptible():
            pytest.fail("began new work after the signal")
    assert finished


def test_who_waits_for_remote_work_is_told_instead_of_interrupted() -> None:
    stop = Stop()
    with stop.installed(), stop.interruptible():
        send()
        assert stop.must_give_up()


def test_remote_work_that_must_not_be_cut_has_a_grace_period() -> None:
    stop = Stop(grace_s=60.0)
    with stop.installed():
        send()
        assert not stop.must_give_up()
        assert not stop.grace_expired()
        stop.grace_s = 0.05
        time.sleep(0.1)
        assert stop.must_give_up()
        assert stop.grace_expired()


def test_a_run_on_ray_is_interrupted_in_what_it_does_itself() -> None:
    """Loading data is not remote: nobody there asks whether to stop."""
    stop = Stop()
    reached: list[str] = []

    def load() -> None:
        with stop.interruptible(here=True):
            send()
            reached.append("the line after the signal")

    with stop.installed(), pytest.raises(StopRequested):
        load()
    assert reached == []


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in stop_module.SIGNALS]
    with Stop().installed():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in stop_module.SIGNALS] == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As SIGINT is in a background job of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop(interrupt=True)
        with stop.installed(), stop.interruptible():
            stop.install()  # as after Ray has installed handlers of its own
            send(signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_signal_cleans_up_and_leaves() -> None:
    calls: list[object] = []
    stop = Stop(clean_up=lambda: calls.append("clean"), leave=calls.append)
    with stop.installed():
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert calls == ["clean", 130]


def test_a_clean_up_that_hangs_does_not_keep_the_process() -> None:
    program = """
import os, signal, time
from rlxf.core import stop
stop.LEAVE_S = 0.3
with stop.Stop(clean_up=lambda: time.sleep(60)).installed():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=30)
    assert done.returncode == 143
    assert time.monotonic() - begin < 20
