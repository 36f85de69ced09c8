"""The one wait: in order, bounded, and clear about who was lost where."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import ray

from rlxf.core.clock import Clock
from rlxf.core.errors import ModelError, StageTimeout, StopRequested, WorkerLost
from rlxf.core.stop import Stop
from workers.group import Member, WorkerGroup
from workers.remote import Waiter

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


class Room:
    """A worker that does what the test wants."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def echo(self, value: Any, delay_s: float = 0.0) -> tuple[int, Any]:
        time.sleep(delay_s)
        return self.rank, value

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise ModelError("models/x: no config.json in it")

    def die(self, rank: int) -> None:
        if self.rank == rank:
            os._exit(1)
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")  # what a collective says on the surviving ranks


def group(size: int = 2, *, timeout_s: float = 60.0, stop: Stop | None = None) -> WorkerGroup:
    clock = Clock()
    clock.start(6)
    with clock("ref"):
        pass  # the place of waits that follow
    room = ray.remote(Room).options(num_cpus=0)
    members = [Member(room.remote(rank), f"ref rank {rank}", "10.0.0.1") for rank in range(size)]
    made = WorkerGroup(members, Waiter(clock, stop or Stop(), timeout_s))
    made.call("echo", 0, timeout_s=60.0)  # the processes are up: what follows is timed
    return made


def test_every_rank_is_called_and_rank_zero_answers() -> None:
    ranks = group(3)
    answers = ranks.waiter.gather(ranks.send("echo", [1, 2]))
    assert answers == [(0, [1, 2]), (1, [1, 2]), (2, [1, 2])]
    assert ranks.call("echo", "x") == (0, "x")


def test_answers_come_in_the_order_of_the_calls_not_of_their_ends() -> None:
    ranks = group(2)
    slow = ranks.send("echo", "slow", 0.5)[0]
    fast = ranks.send("echo", "fast")[1]
    assert ranks.waiter.gather([slow, fast]) == [(0, "slow"), (1, "fast")]


def test_a_dead_worker_is_named_at_once_with_place_and_cause() -> None:
    ranks = group(1)
    pending = ranks.send("sleep", 60.0)
    threading.Timer(0.5, ray.kill, args=[ranks.members[0].handle]).start()
    begin = time.monotonic()
    with pytest.raises(WorkerLost, match=r"stage ref, step 7: lost ref rank 0 on node 10\.0\.0\.1 during sleep: .+"):
        ranks.waiter.gather(pending)
    assert time.monotonic() - begin < 5


def test_the_death_is_reported_not_the_failures_that_it_caused() -> None:
    ranks = group(3)
    with pytest.raises(WorkerLost, match="lost ref rank 2"):
        ranks.call("die", 2)


def test_a_hanging_worker_ends_the_wait_at_the_deadline() -> None:
    ranks = group(2, timeout_s=1.0)
    begin = time.monotonic()
    with pytest.raises(
        StageTimeout, match=r"stage ref, step 7: no answer within 1 s from sleep of ref rank 0 .*ref rank 1"
    ):
        ranks.call("sleep", 30.0)
    assert time.monotonic() - begin < 3


def test_an_error_of_a_room_arrives_as_it_was_raised() -> None:
    with pytest.raises(ModelError) as caught:
        group(2).call("refuse")
    assert str(caught.value) == "models/x: no config.json in it"
    assert caught.value.exit_code == 2


def test_a_signal_ends_the_wait_for_work_that_may_be_dropped() -> None:
    stop = Stop()
    ranks = group(1, stop=stop)
    pending = ranks.send("sleep", 30.0)
    threading.Timer(0.5, os.kill, args=[os.getpid(), signal.SIGTERM]).start()
    begin = time.monotonic()
    with stop.installed(), stop.interruptible(), pytest.raises(StopRequested, match="sleep of ref rank 0"):
        ranks.waiter.gather(pending)
    assert time.monotonic() - begin < 3


def test_a_signal_lets_work_end_that_must_not_be_cut() -> None:
    stop = Stop()
    ranks = group(1, stop=stop)
    pending = ranks.send("echo", "done", 1.5)
    threading.Timer(0.3, os.kill, args=[os.getpid(), signal.SIGTERM]).start()
    with stop.installed():
        assert ranks.waiter.gather(pending) == [(0, "done")]
    assert stop.requested
