"""Prompts of a step on several engines in parts, without a cluster: each prompt once, whoever is late or lost."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest

from rlxf.core.errors import WorkerLost
from rlxf.core.types import PromptBatch, Rollouts
from rlxf.rollout.chunks import Gathered
from rlxf.rollout.dispatch import Dispatch, deal
from rlxf.rollout.engine import Sampling
from tests.unit.workers.fakes import Process
from tests.unit.workers.test_engines import PROMPTS, SAMPLING, Engine, World, assert_whole
from workers import group as module
from workers.engine import RolloutWorker

K = SAMPLING.num_samples


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "put", lambda value: value)


class PromptByPrompt:
    """A session that ends one prompt at a time, the last one first."""

    num_slots = 2 * K

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self._left: list[PromptBatch] = []

    def add(self, prompts: PromptBatch) -> None:
        self._left += [prompts.select([row]) for row in range(len(prompts))]

    def advance(self) -> Rollouts | None:
        return self._engine.generate(self._left.pop(), self._sampling) if self._left else None

    def close(self) -> None:
        self._left.clear()


class InParts:
    """A worker around an engine of the tests: the real worker's methods for sampling."""

    num_slots, start, advance = map(
        inspect.unwrap, (RolloutWorker.num_slots, RolloutWorker.start, RolloutWorker.advance)
    )
    _next_chunks = inspect.unwrap(RolloutWorker._next_chunks)
    share: Any = None

    def __init__(self) -> None:
        self.engine = SessionEngine()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class SessionEngine(Engine):
    def session(self, sampling: Sampling) -> Any:
        self.state.require_ready()
        return PromptByPrompt(self, sampling)


def world_of(*dies_in: list[str]) -> World:
    """Engines that hand over in parts; those that take the place of lost ones do, too."""
    world = World(*([] for _ in dies_in))
    for process, methods in zip(world.processes, dies_in, strict=True):
        weights, state = process.room.weights, process.room.state
        process.room = InParts()
        process.room.engine.weights, process.room.engine.state = weights, state
        process.dies_in += methods
    world.starts.make = lambda rank: Process(InParts(), world.later.pop(0) if world.later else ())
    return world


def dispatch_of(world: World, mode: Any, chunk: int) -> Dispatch:
    work = [9.0, 1.0, 5.0, 3.0, 7.0]
    engines = world.engines.num_engines
    return deal(work, engines, slots_per_engine=2 * K, samples_per_prompt=K, chunk=chunk, mode=mode)


def sample(world: World, dispatch: Dispatch) -> list[Rollouts]:
    return list(world.engines.sample(PROMPTS, SAMPLING, dispatch))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["planned", "queue"])
@pytest.mark.parametrize(
    "dies_in", [([],), ([], [], []), (["start"], [], []), ([], ["advance"]), (["advance"],), (["start"],)]
)
def test_every_prompt_comes_once(dies_in: tuple[list[str], ...], mode: str, seed: int) -> None:
    world, draw = world_of(*map(list, dies_in)), random.Random(seed)
    world.waiter.choose, world.waiter.late = draw.choice, set()
    dispatch = dispatch_of(world, mode, chunk=2)
    gathered = Gathered(PROMPTS, dispatch.chunks, num_samples=K)
    whole = [chunk.rows for part in sample(world, dispatch) for chunk in gathered.add(part)]
    assert sorted(whole) == sorted(dispatch.chunks)
    assert_whole(gathered.whole())


def test_an_engine_hands_over_whole_chunks_and_has_its_next_call_before_it_is_done() -> None:
    world = world_of([])
    dispatch = dispatch_of(world, "planned", chunk=2)
    parts = [part.prompts.positions.tolist() for part in sample(world, dispatch)]
    assert sorted(map(sorted, parts)) == sorted(map(sorted, dispatch.chunks))
    assert world.calls(0) == ["start", "advance", "advance"]  # two chunks: one call is always on its way


def test_what_a_lost_engine_had_handed_over_is_not_handed_over_again() -> None:
    world = world_of(["advance"])
    world.processes[0].dies_in = []
    dispatch = dispatch_of(world, "planned", chunk=1)
    found = world.engines.sample(PROMPTS, SAMPLING, dispatch)
    first = next(found).prompts.positions.tolist()
    world.group.members[0].handle.dies_in.append("advance")
    others = [part.prompts.positions.tolist() for part in found]
    assert world.starts.started == [0]
    assert sorted(position for part in (first, *others) for position in part) == [0, 1, 2, 3, 4]


def test_a_queue_gives_each_engine_as_much_as_it_has_room_for() -> None:
    """Two prompts each; the fifth goes to who is done first."""
    world = world_of([], [])
    parts = sample(world, dispatch_of(world, "queue", chunk=1))
    counts = [sum(int(part.engine[0]) == engine for part in parts if part.engine is not None) for engine in (0, 1)]
    assert sorted(counts) == [2, 3]


@pytest.mark.parametrize("mode", ["planned", "queue"])
def test_two_engines_lost_over_the_same_prompts_end_the_run(mode: str) -> None:
    world = world_of(["start"], ["start", "start"])
    world.later = [["start"], ["start"]]
    with pytest.raises(WorkerLost):
        sample(world, dispatch_of(world, mode, chunk=1))


def test_the_number_of_slots_is_asked_of_an_engine_that_is_there() -> None:
    world = world_of(["num_slots"], [])
    assert world.engines.num_slots(SAMPLING) == 2 * K
    assert world.engines.num_slots(SAMPLING) == 2 * K
    assert (world.calls(0), world.calls(1)) == (["num_slots"], ["num_slots"])
