"""The order in which an engine sleeps, wakes, gets its weights and samples, and every wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlxf.core.errors import SyncError
from rlxf.rollout.engine import EngineState, WeightState

STALE, READY, ASLEEP, AWAKE = EngineState.STALE, EngineState.READY, EngineState.ASLEEP, EngineState.WEIGHTS_AWAKE


def fresh(start: EngineState = READY) -> WeightState:
    return WeightState(start)


def receiving(start: EngineState = READY) -> WeightState:
    state = WeightState(start)
    state.begin()
    return state


def asleep() -> WeightState:
    state = WeightState()
    state.sleep()
    return state


def weights_awake(push: str = "none") -> WeightState:
    state = asleep()
    state.wake_weights()
    if push != "none":
        state.begin()
    if push == "whole":
        state.end(7)
    return state


def awake_again() -> WeightState:
    state = weights_awake("whole")
    state.wake_cache()
    return state


@pytest.mark.parametrize("start", [READY, STALE])
def test_the_right_order_ends_ready(start: EngineState) -> None:
    state, done = WeightState(start), list[str]()
    state.sleep(lambda: done.append("free"))
    state.wake_weights(lambda: done.append("weights"))
    state.begin()
    with state.receiving():
        pass
    state.end(3)
    state.wake_cache(lambda: done.append("cache"))
    state.require_ready()
    assert (state.state, state.version, done) == (READY, 3, ["free", "weights", "cache"])


WRONG: dict[str, tuple[Callable[[], WeightState], Callable[[WeightState], object], str]] = {
    "sleep twice": (asleep, WeightState.sleep, "asleep already"),
    "sleep half awake": (weights_awake, WeightState.sleep, "half awake"),
    "sleep before the cache wakes": (lambda: weights_awake("whole"), WeightState.sleep, "half awake"),
    "sleep in an update": (receiving, WeightState.sleep, "in an update and cannot sleep"),
    "wake one that is ready": (fresh, WeightState.wake_weights, "is ready, not asleep"),
    "wake one that has only loaded": (lambda: fresh(STALE), WeightState.wake_weights, "is stale, not asleep"),
    "wake in an update": (receiving, WeightState.wake_weights, "is stale, not asleep"),
    "wake weights twice": (weights_awake, WeightState.wake_weights, "weights awake, not asleep: .* cannot wake twice"),
    "wake weights after the push": (lambda: weights_awake("whole"), WeightState.wake_weights, "cannot wake twice"),
    "cache of one that sleeps": (asleep, WeightState.wake_cache, "is asleep; wake its weights"),
    "cache before a push": (weights_awake, WeightState.wake_cache, "no whole push has ended since it woke"),
    "cache in a push": (lambda: weights_awake("begun"), WeightState.wake_cache, "no whole push has ended"),
    "cache of one that is ready": (fresh, WeightState.wake_cache, "is ready and has its cache"),
    "cache of one in an update": (receiving, WeightState.wake_cache, "is stale and has its cache"),
    "cache twice": (awake_again, WeightState.wake_cache, "is ready and has its cache"),
    "push asleep": (asleep, WeightState.begin, "asleep and has no room for weights; wake it"),
    "end of nothing": (fresh, lambda state: state.end(1), "call begin_update first"),
    "end asleep": (asleep, lambda state: state.end(1), "call begin_update first"),
    "end of nothing, half awake": (weights_awake, lambda state: state.end(1), "call begin_update first"),
    "sample asleep": (asleep, WeightState.require_ready, "is asleep, without weights"),
    "sample half awake": (weights_awake, WeightState.require_ready, "has room for weights, but none since it slept"),
    "sample in the push": (lambda: weights_awake("begun"), WeightState.require_ready, "a mixture of version 0"),
    "sample without a cache": (
        lambda: weights_awake("whole"), WeightState.require_ready, "of version 7, but its cache is away"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_order_is_refused_and_changes_nothing(case: str) -> None:
    make, call, message = WRONG[case]
    state, same = make(), make()
    with pytest.raises(SyncError, match=message):
        call(state)
    assert vars(state) == vars(same)


def test_a_push_that_breaks_off_after_a_wake_begins_again() -> None:
    state = weights_awake("begun")
    with pytest.raises(ZeroDivisionError), state.receiving():
        _ = 1 / 0
    state.begin()
    with state.receiving():
        pass
    state.end(2)
    state.begin()  # also a whole one may be replaced, before the cache wakes
    with pytest.raises(SyncError, match="no whole push has ended"):
        state.wake_cache()
    state.end(3)
    state.wake_cache()
    assert (state.state, state.version) == (READY, 3)


def _fails() -> None:
    raise SyncError("no memory")


def test_after_a_failure_the_engine_is_where_it_was_or_asleep() -> None:
    state = fresh()
    with pytest.raises(SyncError, match="no memory"):
        state.sleep(_fails)
    assert state.state is ASLEEP
    with pytest.raises(SyncError, match="no memory"):
        state.wake_weights(_fails)
    assert state.state is ASLEEP
    state = weights_awake("whole")
    with pytest.raises(SyncError, match="no memory"):
        state.wake_cache(_fails)
    assert state.state is AWAKE
    state.wake_cache()


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called, an engine is ready only with weights that came whole since its last wake."""

    @initialize(start=st.sampled_from([READY, STALE]))
    def begins(self, start: EngineState) -> None:
        self.state = WeightState(start)
        self.whole = start is READY  # what it holds may be sampled from
        self.room = self.cache = True
        self.pushing = False

    @rule(name=st.sampled_from(["sleep", "wake_weights", "wake_cache", "begin", "end", "receive", "break"]))
    def call(self, name: str) -> None:
        before = self.state.state
        try:
            self._call(name)
        except SyncError:
            assert self.state.state is before
            return
        except ZeroDivisionError:
            return
        if name == "sleep":
            assert self.room
            assert self.cache
            self.room = self.cache = self.whole = False
        elif name == "wake_weights":
            assert not self.room  # nothing is mapped twice
            self.room, self.whole = True, False
        elif name == "wake_cache":
            assert not self.cache
            self.cache = True
        elif name == "begin":
            assert self.room
            self.pushing, self.whole = True, False
        elif name == "end":
            assert self.pushing
            self.pushing, self.whole = False, True

    def _call(self, name: str) -> None:
        if name == "end":
            with self.state.receiving():
                pass
            self.state.end(1)
        elif name == "receive":
            with self.state.receiving():
                pass
        elif name == "break":
            with self.state.receiving():
                _ = 1 / 0
        else:
            getattr(self.state, name)()

    @invariant()
    def ready_only_when_whole(self) -> None:
        try:
            self.state.require_ready()
        except SyncError:
            assert self.state.state is not READY
            return
        assert self.whole
        assert self.room
        assert self.cache


class TestAnyOrder(AnyOrder.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
