"""Trainer and engines on the same devices: the order in which each has its memory, and what is out of turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlxf.core.errors import SyncError
from rlxf.sync.turns import Turns

# What has to be away from the device before this comes to it.
BEFORE = {
    "trainer: restore": {"engines' weights", "engines' caches"},
    "engines: wake_weights": {"optimizer"},
    "push": {"optimizer", "engines' caches"},
    "engines: wake_cache": {"optimizer", "trainer's unused memory"},
}
COMES = {
    "trainer: restore": {"optimizer", "trainer's unused memory"},
    "engines: wake_weights": {"engines' weights"},
    "push": {"trainer's unused memory"},  # the pieces that it packed
    "engines: wake_cache": {"engines' caches"},
}
GOES = {
    "engines: sleep": {"engines' weights", "engines' caches"},
    "trainer: offload": {"optimizer"},
    "trainer: free_cache": {"trainer's unused memory"},
}


class Device:
    """Knows what is on it, and refuses what has no room yet."""

    def __init__(self) -> None:
        self.holds = {"optimizer", "trainer's unused memory"}  # the engines sleep until the trainer has loaded
        self.calls: list[str] = []

    def __call__(self, call: str) -> None:
        self.calls.append(call)
        assert not BEFORE.get(call, set()) & self.holds, f"{call} while the device holds {self.holds}"
        self.holds = (self.holds | COMES.get(call, set())) - GOES.get(call, set())


class Side:
    def __init__(self, name: str, device: Device) -> None:
        self._name, self._device = name, device

    def __getattr__(self, method: str) -> Callable[[], None]:
        return lambda: self._device(f"{self._name}: {method}")


class World:
    def __init__(self) -> None:
        self.device = Device()
        trainer, engines = Side("trainer", self.device), Side("engines", self.device)
        self.turns = Turns(trainer, engines)  # type: ignore[arg-type]

    def push(self) -> None:
        self.turns.push(lambda: self.device("push"))

    def step(self) -> None:
        """As the driver takes one."""
        self.turns.sampled()
        self.turns.train()
        self.device("update")
        self.push()


AWAKE = ["engines: wake_weights", "push", "trainer: free_cache", "engines: wake_cache"]
STEP = ["engines: sleep", "trainer: restore", "update", "trainer: offload", *AWAKE]


def test_what_leaves_the_device_leaves_it_before_anything_comes() -> None:
    world = World()
    world.push()
    for _ in range(3):
        world.step()
    assert world.device.calls == ["trainer: offload", *AWAKE, *STEP * 3]


def test_engines_that_slept_get_the_weights_again_without_an_update() -> None:
    """A step without a pair."""
    world = World()
    world.push()
    world.turns.sampled()
    world.push()
    world.step()
    assert world.device.calls == ["trainer: offload", *AWAKE, "engines: sleep", *AWAKE, *STEP]


def test_a_push_may_follow_a_push() -> None:
    """A resumed run pushes the initial policy for its baseline, and then its own."""
    world = World()
    world.push()
    world.turns.push(lambda: None)
    assert world.device.holds == {"engines' weights", "engines' caches"}


def test_a_push_that_failed_is_made_again() -> None:
    world = World()

    def fails() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        world.turns.push(fails)
    with pytest.raises(SyncError, match="engines cannot go to sleep: weights are being pushed"):
        world.turns.sampled()
    world.turns.push(lambda: None)
    world.turns.sampled()


def test_a_step_that_was_sampled_before_leaves_the_engines_awake_until_the_update() -> None:
    world = World()
    world.push()
    world.turns.train()
    assert world.device.calls[-2:] == ["engines: sleep", "trainer: restore"]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (["sampled"], "the engines cannot go to sleep: the trainer has its optimizer"),
        (["train"], "the trainer cannot take its optimizer back: the trainer has its optimizer"),
        (["push", "sampled", "sampled"], "cannot go to sleep: the engines sleep and the optimizer is away"),
        (["push", "sampled", "train", "sampled"], "cannot go to sleep: the trainer has its optimizer"),
        (["push", "sampled", "train", "train"], "cannot take its optimizer back: the trainer has"),
    ],
)
def test_a_call_out_of_turn_raises(calls: list[str], message: str) -> None:
    world = World()
    *before, last = calls

    def make(call: str) -> None:
        if call == "push":
            world.push()
        else:
            getattr(world.turns, call)()

    for call in before:
        make(call)
    with pytest.raises(SyncError, match=message):
        make(last)
