"""Groups of workers that lose one, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlxf.core.errors import ScoreError, StageTimeout, WorkerLost
from tests.unit.workers.fakes import AtOnce, Process, Starts, member
from workers import group as module
from workers.group import StatelessGroup


class Room:
    def double(self, value: int) -> int:
        return 2 * value

    def fail(self) -> None:
        raise ScoreError("no scores")


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "put", lambda value: value)


def make_group(*processes: Process, later: list[Process] | None = None) -> tuple[StatelessGroup, Starts]:
    """A group of these processes; ``later``: those that take their places, in order."""
    rest = iter(later or ())
    starts = Starts(lambda rank: next(rest, Process(Room())))
    return StatelessGroup([member(one, rank) for rank, one in enumerate(processes)], AtOnce(), starts), starts


@pytest.mark.parametrize("which", [0, 1])
def test_a_call_in_which_a_rank_is_lost_is_made_again_by_all_of_them(which: int) -> None:
    processes = [Process(Room()), Process(Room())]
    processes[which].dies_in.append("double")
    group, starts = make_group(*processes)
    assert group.call("double", 4) == 8
    assert (starts.started, starts.back) == ([0, 1], [0, 1])
    assert [member.handle.calls for member in group.members] == [["build", "double"]] * 2
    assert group.call("double", 5) == 10
    assert starts.started == [0, 1]


def test_a_rank_that_is_lost_twice_in_one_call_ends_the_run() -> None:
    group, starts = make_group(Process(Room(), ["double"]), later=[Process(Room(), ["double"])])
    with pytest.raises(WorkerLost, match="lost rank 0 on node a during double"):
        group.call("double", 4)
    assert (starts.started, starts.back) == ([0], [])


def test_a_rank_that_is_lost_while_it_loads_again_ends_the_run() -> None:
    group, starts = make_group(Process(Room(), ["double"]), later=[Process(Room(), ["build"])])
    with pytest.raises(WorkerLost, match="lost rank 0 on node a during build"):
        group.call("double", 4)
    assert starts.started == [0]


def test_a_rank_that_is_lost_twice_before_it_has_answered_ends_the_run() -> None:
    group, starts = make_group(Process(Room(), ["double"]), later=[Process(Room(), ["fail"])])
    starts_loading = starts.wait_for_loading

    def broken_off(*_: object) -> None:
        raise StageTimeout("somebody does not wait any more")

    starts.wait_for_loading = broken_off  # type: ignore[method-assign]
    with pytest.raises(StageTimeout):
        group.call("double", 4)
    starts.wait_for_loading = starts_loading  # type: ignore[method-assign]
    with pytest.raises(WorkerLost, match="lost rank 0 on node a during fail"):
        group.call("fail")
    assert starts.started == [0]


def test_it_may_be_lost_again_after_an_answer() -> None:
    group, starts = make_group(
        Process(Room(), ["double"]), later=[Process(Room(), []), Process(Room()), Process(Room())]
    )
    assert group.call("double", 1) == 2
    for times in (2, 3):
        group.members[0].handle.dies_in.append("double")
        assert group.call("double", times) == 2 * times
    assert starts.started == [0, 0, 0]


def test_an_error_of_the_room_is_no_loss() -> None:
    group, starts = make_group(Process(Room()), Process(Room()))
    with pytest.raises(ScoreError, match="no scores"):
        group.call("fail")
    assert starts.started == []


def test_a_call_that_broke_off_while_they_loaded_is_followed_by_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    group, starts = make_group(Process(Room(), ["double"]))
    waits: list[int] = []

    def wait(calls: list[object]) -> None:
        waits.append(len(calls))
        if len(waits) == 1:
            raise StageTimeout("broken off")

    monkeypatch.setattr(starts, "wait_for_loading", wait)
    with pytest.raises(StageTimeout):
        group.call("double", 4)
    assert group.call("double", 4) == 8
    assert group.call("double", 4) == 8
    assert (waits, starts.started, starts.back) == ([1, 1], [0], [0])


def test_what_nobody_starts_again_is_an_error() -> None:
    group = StatelessGroup([member(Process(Room(), ["double"]), 0)], AtOnce())
    with pytest.raises(WorkerLost):
        group.call("double", 4)


def test_a_loss_of_which_no_process_is_gone_is_an_error() -> None:
    """An answer was lost with the node that held it, but every worker lives."""
    process = Process(SimpleNamespace())
    group, starts = make_group(process)

    def lose(*_: object) -> None:
        raise WorkerLost("the answer is lost")

    process.room.double = lose
    with pytest.raises(WorkerLost, match="the answer is lost"):
        group.call("double", 4)
    assert starts.started == []
