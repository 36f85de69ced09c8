"""Waits for remote calls without a cluster: what the observer sees of them, and how they end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rlxf.core.clock import Clock, Span
from rlxf.core.errors import ScoreError, StageTimeout, StopRequested, WorkerLost
from rlxf.core.stop import Stop
from workers import remote
from workers.remote import ENDED_S, Pending, Waiter


class Seen:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Span]] = []

    def stage(self, span: Span, roles: Sequence[str]) -> None: ...

    def call(self, worker: str, span: Span) -> None:
        self.calls.append((worker, span))


def test_a_call_lasts_from_when_it_was_made_until_its_answer_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hands, seen = [10.0], Seen()
    clock = Clock((), seen, now=lambda: hands[0])
    waiter = Waiter(clock, Stop(), 60.0)

    def wait(refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        hands[0] += 1
        return refs[-1:], refs[:-1]

    monkeypatch.setattr(remote.ray, "wait", wait)
    monkeypatch.setattr(remote.ray, "get", lambda ref, **_: f"answer {ref}")
    calls = [Pending(ref, f"infer rank {rank} on node a", "generate", 9.5) for rank, ref in enumerate("xy")]
    clock.start(2)
    with clock("gen", step=3, version=1):
        assert waiter.gather(calls) == ["answer x", "answer y"]
    assert seen.calls == [
        ("infer rank 1 on node a", Span("gen", 4, 1, 9.5, 11.0)),
        ("infer rank 0 on node a", Span("gen", 4, 1, 9.5, 12.0)),
    ]


class Remote:
    """Ray's side of calls: what answers when, and a clock that waits set forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answers: dict[str, Any] = {}  # of calls that are answered: values, or errors
        self.after: dict[str, Callable[[], Any]] = {}  # their answer from some time on; None: not yet

    def wait(self, refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        if not self._ready(refs):
            self.now += max(timeout, 0.01)
        ready = self._ready(refs)[:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def _ready(self, refs: list[str]) -> list[str]:
        for ref in [ref for ref in refs if ref in self.after]:
            if (answer := self.after[ref]()) is not None:
                self.answers[ref] = answer
        return [ref for ref in refs if ref in self.answers]

    def get(self, ref: str, timeout: float) -> Any:
        if isinstance(answer := self.answers[ref], Exception):
            raise answer
        return answer


class Watching:
    """A watch that is told what to find; a worker that it has ended dies, if Ray can end it."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.hung: dict[str, str] = {}  # by worker: the reason
        self.busy: set[str] = set()
        self.ended: dict[str, str] = {}
        self.gone: list[str] = []
        self.dies = True

    def end_hung(self, names: Collection[str], place: str) -> None:
        for name in set(names) & set(self.hung):
            self._end(name, self.hung[name])

    def end_overdue(self, names: Collection[str], place: str) -> bool:
        for name in (found := set(names) & self.busy):
            self._end(name, "no answer within 60 s")
        return bool(found)

    def mark_gone(self, name: str) -> None:
        self.gone.append(name)

    def memory_at_end(self, name: str) -> None:
        return None

    def why_ended(self, name: str) -> str | None:
        return self.ended.get(name)

    def _end(self, name: str, why: str) -> None:
        self.ended[name] = why
        if self.dies:
            self.remote.answers[f"ref of {name}"] = ActorDiedError()


@pytest.fixture
def ray_side(monkeypatch: pytest.MonkeyPatch) -> Remote:
    found = Remote()
    monkeypatch.setattr(remote.ray, "wait", found.wait)
    monkeypatch.setattr(remote.ray, "get", found.get)
    monkeypatch.setattr(remote.time, "monotonic", lambda: found.now)
    return found


def call(worker: str, made: str = "logps") -> Pending:
    return Pending(f"ref of {worker}", worker, made)


def waiting(watch: Watching | None = None) -> tuple[Waiter, Clock]:
    clock = Clock()
    clock.start(2)
    return Waiter(clock, Stop(), 60.0, "the logs", watch), clock


def test_a_worker_that_hangs_is_lost_with_the_reason(ray_side: Remote) -> None:
    watch = Watching(ray_side)
    watch.hung["a"] = "no progress for 61 s; stacks: there"
    waiter, clock = waiting(watch)
    with clock("ref"), pytest.raises(WorkerLost) as lost:
        waiter.gather([call("a"), call("b")])
    assert str(lost.value) == (
        "stage ref, step 3: lost a during logps: it was ended, because of no progress for 61 s; stacks: there. "
        "Logs: the logs"
    )
    assert lost.value.stage == "ref"
    assert watch.gone == ["a"]  # whatever Ray has noted of it until now
    with clock("ref"):
        answer = waiter.first([call("a"), call("b")])
    assert answer.call.worker == "a"
    assert "it was ended, because of no progress" in str(answer.lost)


def test_a_worker_that_takes_longer_than_a_stage_may_is_lost(ray_side: Remote) -> None:
    watch = Watching(ray_side)
    watch.busy = {"a"}
    with pytest.raises(WorkerLost, match="lost a during logps: it was ended, because of no answer within 60 s"):
        waiting(watch)[0].gather([call("a"), call("b")])
    assert 60.0 <= ray_side.now < 62.0


def test_a_worker_that_took_too_long_and_cannot_be_ended_ends_the_wait(ray_side: Remote) -> None:
    watch = Watching(ray_side)
    watch.busy, watch.dies = {"a"}, False
    with pytest.raises(StageTimeout, match="no answer within 60 s from logps of a"):
        waiting(watch)[0].gather([call("a")])
    assert ray_side.now < 60.0 + ENDED_S + 2.0


@pytest.mark.parametrize("watched", [True, False])
def test_a_call_with_a_limit_of_its_own_ends_with_it(ray_side: Remote, watched: bool) -> None:
    watch = Watching(ray_side)
    watch.busy = {"a"}
    waiter, _ = waiting(watch if watched else None)
    with pytest.raises(StageTimeout, match=r"no answer within 10 s from logps of a; .* raise training\."):
        waiter.gather([call("a")], 10.0)
    assert watch.ended == {}


def test_a_wait_in_which_nobody_is_at_work_ends_with_its_limit(ray_side: Remote) -> None:
    with pytest.raises(StageTimeout, match="no answer within 60 s from logps of a"):
        waiting(Watching(ray_side))[0].gather([call("a")])


def test_a_death_is_told_before_the_failures_that_it_caused(ray_side: Remote) -> None:
    ray_side.answers["ref of a"] = RayTaskError("logps", "a broken group", RuntimeError("Connection closed by peer"))
    ray_side.after["ref of b"] = lambda: ActorDiedError() if ray_side.now > 1.0 else None
    with pytest.raises(WorkerLost, match="lost b during logps: "):
        waiting()[0].gather([call("a"), call("b")])


def test_a_failure_that_no_death_caused_is_raised_as_it_is(ray_side: Remote) -> None:
    ray_side.answers["ref of a"] = RayTaskError("logps", "text", ScoreError("no scores"))
    with pytest.raises(ScoreError, match="no scores"):
        waiting()[0].gather([call("a"), call("b")])
    with pytest.raises(ScoreError, match="no scores"):
        waiting()[0].first([call("a"), call("b")])


def test_the_first_answer_is_the_one_that_is_there(ray_side: Remote) -> None:
    ray_side.answers["ref of b"] = 7
    answer = waiting()[0].first([call("a"), call("b")])
    assert (answer.call.worker, answer.value, answer.lost) == ("b", 7, None)


def test_a_wait_for_nothing_but_time_ends_at_a_signal(ray_side: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    stop = Stop()
    waiter = Waiter(Clock(), stop, 60.0)
    waiter.rest(5.0)
    with stop.interruptible():
        stop._signal = signal.SIGTERM
        with pytest.raises(StopRequested, match="stopped while waiting for devices by SIGTERM"):
            waiter.rest(5.0)
