"""Who hangs and who does not, without a cluster: signs in a dict, and a clock that is set by hand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.events import NAME, recorded_events
from rlxf.core.memory import Memory
from rlxf.core.progress import Seen
from workers import watch as module
from workers.signs import BEAT_S, Process, Sign
from workers.watch import LOADING_S, Limits, Watch

LIMITS = Limits(min_deadline_s=60.0, stage_s=600.0, start_s=300.0)
PLACE = "stage ref, step 3"
LEAST, START, STAGE = "resilience.min_deadline_s", "training.start_timeout_s", "training.stage_timeout_s"
USUAL = "ten times as long as usual"


MEMORY = Memory(limit=2, available=1)


class World:
    """The store, the time, the workers that Ray knows to be dead, and what was done to whom."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}
        self.now = 1000.0
        self.dead: set[str] = set()
        self.ended: list[str] = []
        self.numbers: dict[str, int] = {}
        self.answers = True  # the head node

    def get(self, key: str) -> bytes | None:
        if not self.answers:
            raise ConnectionError("the head node is gone")
        return self.store.get(key)

    def end(self, handle: str, process: Process | None, node: str, name: str) -> str:
        self.ended.append(name)
        return "stacks: there"

    def watch(self, limits: Limits = LIMITS) -> Watch:
        ending: Any = self
        return Watch(limits, ending, now=lambda: self.now)

    def sign(
        self, watch: Watch, name: str, counter: int, phase: str, medians: Mapping[str, float] | None = None
    ) -> None:
        """A sign of the worker of that name, which is its key, too."""
        number = self.numbers[name] = self.numbers.get(name, 0) + 1
        seen = Seen(counter, phase, dict(medians or {}))
        sign = Sign(
            number=number,
            process=Process(pid=1, started=1, machine="m"),
            rss=1,
            seen=seen,
            memory=Memory(limit=2, available=1),
        )
        self.store[f"{watch.run}/{name}"] = sign.to_bytes()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return patched(World(), monkeypatch)


def patched(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "new_run", lambda: "run")
    monkeypatch.setattr(module, "put", lambda key, value: None)
    monkeypatch.setattr(module, "get", world.get)
    monkeypatch.setattr(module, "forget", lambda run: world.store.clear())
    monkeypatch.setattr(module, "_is_dead", lambda handle: handle in world.dead)
    monkeypatch.setattr(Watch, "_follow_all", lambda watch: None)  # tests look themselves
    return world


def follow(watch: Watch, *names: str, role: str = "ref") -> None:
    for name in names:
        watch.follow(name, role=role, node="a", key=name, handle=name)


def pass_time(world: World, watch: Watch, seconds: float, **signing: tuple[int, str]) -> None:
    """As many seconds, with a look twice in each of them; ``signing``: who gives signs, with its counter and phase."""
    for _ in range(round(seconds / BEAT_S)):
        world.now += BEAT_S
        for name, (counter, phase) in signing.items():
            world.sign(watch, name, counter, phase)
        watch._look_at_all()


@pytest.mark.parametrize(
    ("phase", "median", "limit", "origin"),
    [
        ("logps", 2.0, 60.0, LEAST),  # at least min_deadline_s
        ("logps", 20.0, 200.0, USUAL),  # ten times the median
        ("logps", 100.0, 600.0, STAGE),  # at most stage_timeout_s
        ("logps", None, 300.0, START),  # nobody has done that so far: ranks connect
        ("first logps", 2.0, 300.0, START),
        ("build", 2.0, 300.0, START),
        ("first build", None, 300.0, START),
        ("first save_checkpoint (waits)", None, 600.0, STAGE),  # a slow disk: any stage's time
        ("save_hf", None, 600.0, STAGE),
    ],
)
def test_how_long_a_phase_may_stand_still(
    world: World, phase: str, median: float | None, limit: float, origin: str
) -> None:
    stands_still_at_most(world, phase, {} if median is None else {"logps": median}, limit, origin)


@pytest.mark.parametrize(
    ("phase", "first", "limit", "origin"),
    [
        ("first logps", 20.0, 200.0, USUAL),  # an earlier process of the role has done it
        ("logps", 20.0, 200.0, USUAL),  # the second time
        ("logps", 1.0, 60.0, LEAST),
        ("save_hf", 20.0, 600.0, STAGE),
    ],
)
def test_the_first_time_of_a_phase_bounds_the_next_one(
    world: World, phase: str, first: float, limit: float, origin: str
) -> None:
    stands_still_at_most(world, phase, {f"first {phase.removeprefix('first ')}": first}, limit, origin)


def stands_still_at_most(world: World, phase: str, medians: Mapping[str, float], limit: float, origin: str) -> None:
    watch = world.watch()
    follow(watch, "a")
    world.sign(watch, "a", 1, phase, medians)
    watch._look_at_all()
    pass_time(world, watch, limit, a=(1, phase))
    watch.end_hung(["a"], PLACE)
    assert world.ended == []
    pass_time(world, watch, 1, a=(1, phase))
    watch.end_hung(["a"], PLACE)
    assert world.ended == ["a"]
    reason = f"no progress for {limit + 1:.0f} s in {phase}, whose limit is {limit:.0f} s ({origin}); stacks: there"
    assert watch.why_ended("a") == reason


def test_a_new_process_of_a_role_has_the_medians_of_the_one_before(world: World) -> None:
    watch = world.watch()
    follow(watch, "a")
    world.sign(watch, "a", 1, "logps", {"logps": 20.0})
    watch._look_at_all()
    watch.leave("a")
    follow(watch, "b")
    pass_time(world, watch, 201, b=(1, "logps"))
    watch.end_hung(["b"], PLACE)
    assert world.ended == ["b"]


@pytest.mark.parametrize(("phase", "limit"), [("logps", 60.0), ("first logps", 60.0), ("", 60.0)])
def test_a_worker_that_gives_no_signs_is_ended(world: World, phase: str, limit: float) -> None:
    watch = world.watch()
    follow(watch, "a", "b")
    pass_time(world, watch, 1, a=(1, phase), b=(1, ""))
    pass_time(world, watch, limit, b=(1, ""))
    watch.end_hung(["a", "b"], PLACE)
    assert world.ended == []
    pass_time(world, watch, 1, b=(1, ""))
    watch.end_hung(["a", "b"], PLACE)
    assert world.ended == ["a"]
    assert "its process gave no sign of life for 61 s" in str(watch.why_ended("a"))


def test_a_worker_that_loads_may_be_silent_for_longer(world: World) -> None:
    watch = world.watch(Limits(min_deadline_s=5.0, stage_s=600.0, start_s=1800.0))
    follow(watch, "a", "b")
    pass_time(world, watch, 1, a=(1, "first build"), b=(1, "logps"))
    pass_time(world, watch, 6)
    watch.end_hung(["a", "b"], PLACE)
    assert world.ended == ["b"]
    pass_time(world, watch, LOADING_S)
    watch.end_hung(["a", "b"], PLACE)
    assert world.ended == ["b", "a"]


def test_ranks_that_wait_for_a_silent_one_are_not_ended_with_it(world: World) -> None:
    watch = world.watch()
    follow(watch, "stopped", "waits")
    world.sign(watch, "waits", 1, "logps", {"logps": 1.0})
    watch._look_at_all()
    pass_time(world, watch, 1, stopped=(1, "logps"), waits=(1, "logps"))
    pass_time(world, watch, 70, waits=(1, "logps"))
    waits = watch._watched["waits"]
    assert watch._why_hung(waits, watch._looked_at) is not None  # it makes no progress either
    watch.end_hung(["stopped", "waits"], PLACE)
    assert world.ended == ["stopped"]


def test_a_worker_that_nobody_waits_for_is_never_ended(world: World) -> None:
    watch = world.watch()
    follow(watch, "a", "b")
    pass_time(world, watch, 1, a=(1, "logps"), b=(1, "logps"))
    pass_time(world, watch, 700)
    watch.end_hung(["b"], PLACE)
    assert world.ended == ["b"]


def test_a_worker_without_work_may_stand_still(world: World) -> None:
    watch = world.watch()
    follow(watch, "a")
    pass_time(world, watch, 700, a=(1, ""))
    watch.end_hung(["a"], PLACE)
    assert world.ended == []


def test_a_worker_is_ended_once_and_one_that_is_gone_not_at_all(world: World, tmp_path: Path) -> None:
    watch = world.watch()
    follow(watch, "a", "dead", "unsigned")
    with recorded_events(tmp_path):
        pass_time(world, watch, 1, a=(1, "logps"), dead=(1, "logps"))
        world.dead.add("dead")
        pass_time(world, watch, 100)
        for _ in range(3):
            watch.end_hung(["a", "dead", "unsigned", "nobody"], PLACE)
    assert world.ended == ["a"]
    assert watch.is_gone("dead")
    assert not watch.is_gone("unsigned")
    assert watch.why_ended("dead") is None
    gone, row = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert (gone["event"], gone["who"]) == ("gone", "dead")  # although nobody waits for it
    assert (row["event"], row["who"], row["phase"]) == ("hung", "a", "logps")
    assert row["message"].startswith("stage ref, step 3: a hangs: its process gave no sign of life for 100 s")


def test_a_process_that_has_taken_the_place_of_another_meanwhile_is_not_ended(world: World) -> None:
    """The end of one worker takes seconds, in which another thread starts both again."""
    watch = world.watch()
    follow(watch, "a", "b")
    pass_time(world, watch, 1, a=(1, "logps"), b=(1, "logps"))
    pass_time(world, watch, 70)
    end = world.end

    def slow(handle: str, process: Process | None, node: str, name: str) -> str:
        follow(watch, "a", "b")  # new processes, by the same names
        return end(handle, process, node, name)

    world.end = slow  # type: ignore[method-assign]
    watch.end_hung(["a", "b"], PLACE)
    assert world.ended == ["a"]
    assert watch.why_ended("b") is None


def test_a_driver_that_slept_ends_nobody(world: World) -> None:
    """Ctrl-Z: when it goes on, threads that wait may run before the one that looks."""
    watch = world.watch()
    follow(watch, "a")
    world.sign(watch, "a", 1, "logps", {"logps": 1.0})
    watch._look_at_all()
    pass_time(world, watch, 59, a=(1, "logps"))
    world.now += 3600.0
    watch.end_hung(["a"], PLACE)  # before the next look
    watch._look_at_all()  # and after one in which nothing is new yet
    watch.end_hung(["a"], PLACE)
    assert world.ended == []
    pass_time(world, watch, 1, a=(1, "logps"))
    watch.end_hung(["a"], PLACE)
    assert world.ended == ["a"]  # what it stood still before counts


def test_a_head_node_that_does_not_answer_ends_nobody(world: World) -> None:
    watch = world.watch()
    follow(watch, "a")
    pass_time(world, watch, 5, a=(1, "logps"))
    world.answers = False
    for _ in range(600):
        world.now += BEAT_S
        with pytest.raises(ConnectionError):
            watch._look_at_all()
        watch.end_hung(["a"], PLACE)
    world.answers = True
    watch._look_at_all()  # the worker has not been able to give a sign either
    watch.end_hung(["a"], PLACE)
    assert world.ended == []


def test_those_at_work_for_too_long_are_ended(world: World) -> None:
    watch = world.watch()
    follow(watch, "busy", "idle")
    pass_time(world, watch, 1, busy=(1, "logps"), idle=(1, ""))
    assert not watch.end_overdue(["idle"], PLACE)
    assert watch.end_overdue(["busy", "idle"], PLACE)
    assert world.ended == ["busy"]
    assert str(watch.why_ended("busy")).startswith("no answer within training.stage_timeout_s = 600 s; stacks")


def test_everything_that_was_put_is_deleted_at_the_end(world: World) -> None:
    watch = world.watch()
    follow(watch, "a")
    pass_time(world, watch, 1, a=(1, ""))
    watch.close()
    assert world.store == {}


def test_a_head_node_that_does_not_answer_does_not_hide_how_the_run_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(module, "forget", lambda run: free.wait(10))
    monkeypatch.setattr(module, "_CLOSE_S", 0.05)
    watch, begin = world.watch(), time.monotonic()
    watch.close()
    assert time.monotonic() - begin < 5
    free.set()


def test_ray_says_who_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, Any] = {"01": {"State": "DEAD"}, "02": {"State": "ALIVE"}, "03": {}}
    monkeypatch.setattr(module, "actors", states.__getitem__)
    handles = [SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda name=name: name)) for name in states]
    assert [module._is_dead(handle) for handle in handles] == [True, False, False]


def test_a_head_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(module, "actors", lambda name: {"State": "DEAD"} if free.wait(60) else {})
    monkeypatch.setattr(module, "_ANSWER_S", 0.2)
    begin = time.monotonic()
    assert not module._is_dead(SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "01")))
    assert time.monotonic() - begin < 5
    free.set()


# Each step: how long until the driver looks again, whether the worker has moved, and whether it was heard of.
STEPS = st.lists(st.tuples(st.floats(0.5, 20.0), st.booleans(), st.booleans()), max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS, median=st.sampled_from([None, 0.1, 3.0, 10.0, 1000.0]), phase=st.sampled_from(["logps", "first logps"])
)
def test_whoever_moves_within_every_limit_is_never_ended(
    steps: list[tuple[float, bool, bool]], median: float | None, phase: str
) -> None:
    """Also if the driver looks rarely: then it looks late, and does not know more than it has seen."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = patched(World(), monkeypatch)
        watch = world.watch()
        follow(watch, "a")
        counter, moved_at, medians = 1, world.now, {} if median is None else {"logps": median}
        world.sign(watch, "a", counter, phase, medians)
        watch._look_at_all()
        for seconds, moves, heard in steps:
            world.now += seconds
            silent = world.now - moved_at
            if moves or silent + 20.0 > LIMITS.min_deadline_s:  # the promise: it moves and is heard of before the limit
                counter, moved_at = counter + 1, world.now
                world.sign(watch, "a", counter, phase, medians)
            elif heard:
                world.sign(watch, "a", counter, phase, medians)
            watch._look_at_all()
            watch.end_hung(["a"], PLACE)
        assert world.ended == []
