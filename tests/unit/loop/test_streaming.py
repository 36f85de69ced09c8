"""A step whose prompts move on in chunks: other calls, the same numbers, whoever is ready first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.algorithms import ALGORITHMS
from rlxf.core.types import Pairs, PairValues, Rollouts
from rlxf.loop.run import Online
from rlxf.score.combine import RunningScales, Term
from rlxf.score.sources import Rewards, TokenTerm
from tests.unit.loop.ahead import (
    LANES,
    NUM_STEPS,
    SIZE,
    Trace,
    ahead_config,
    break_down,
    ends_early,
    finish,
    numbers,
    require_same,
    samples,
    start,
)
from tests.unit.small_run import NO_TOKENIZER, SmallRun, TokenCounter

DEADLINE_S = 20.0
HAS_MODEL = {"reward__model": "bigram", "reward__load": "reward"}  # the role is there; the scorer is a test's


@cache
def whole(num_ahead: int = 0) -> SmallRun:
    """A run without chunks."""
    return finish(start(ahead_config(num_ahead)))


def streamed(chunk: int, num_ahead: int = 0, **changes: Any) -> Any:
    return ahead_config(num_ahead, rollout__stream_prompts=chunk, **changes)


def require_equal(one: SmallRun, other: SmallRun) -> None:
    assert numbers(one) == numbers(other)
    assert samples(one) == samples(other)
    assert torch.equal(one.actor.logits, other.actor.logits)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("num_ahead", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_no_number(chunk: int, num_ahead: int, lanes: str) -> None:
    small = finish(start(streamed(chunk, num_ahead), lanes=lanes, trace=Trace(jitter=1 + chunk)))
    require_equal(small, whole(num_ahead))


def test_a_chunk_may_be_larger_than_a_step() -> None:
    require_equal(finish(start(streamed(9, 1), lanes="threads", trace=Trace(jitter=3))), whole(1))


class Asked(TokenCounter):
    """Notes the rows of each call."""

    def __init__(self, trace: list[str]) -> None:
        super().__init__(trace)
        self.rows: list[list[int]] = []

    def score(self, rollouts: Rollouts) -> Tensor:
        self.rows.append(rollouts.prompts.row_ids.tolist())
        return super().score(rollouts)


def with_scorer(small: SmallRun, scorer: Any, **term: Any) -> SmallRun:
    source = small.run.source
    assert isinstance(source, Online)
    sources = [TokenTerm(term=Term(name="one", **term), scorer=scorer)]
    rewards = Rewards(sources, NO_TOKENIZER, small.run.state, 10**9, lambda: "a step", small.stop)
    scales = RunningScales(rewards.terms, small.run.state.running)
    small.run = replace(small.run, source=replace(source, rewards=rewards, scales=scales))
    return small


@pytest.mark.parametrize("lanes", LANES)
def test_chunks_are_cut_before_sampling_and_not_by_who_is_ready_first(lanes: str) -> None:
    """The engine hands over the last prompt first; the chunk that is whole first is scored first, as it was cut."""
    small = start(streamed(2, training__train_iters=1), lanes=lanes)
    scorer = Asked(small.trace)
    finish(with_scorer(small, scorer))
    assert sorted(scorer.rows) == [[0, 1], [2, 3]]
    assert scorer.rows[0] == [2, 3]


class Waiting(Trace):
    """The engine waits with some prompts of a step until something else has happened.

    Args:
        before: which prompt of a step, counted from 1, waits.
        events: what has to happen for each of them, once.
    """

    def __init__(self, before: Callable[[int], bool], *events: threading.Semaphore) -> None:
        super().__init__()
        self._before, self._events = before, events
        self._number = 0
        self.missed = 0
        self.prepared = threading.Semaphore(0)

    def append(self, name: str) -> None:
        if name == "rollout":
            self._number = 0
        if name == "part":
            self._number += 1
            if self._before(self._number):
                self.missed += not all(event.acquire(timeout=DEADLINE_S) for event in self._events or (self.prepared,))
        if name == "prepare":
            self.prepared.release()
        super().append(name)


class NoTies(TokenCounter):
    """Each prompt has a pair."""

    def score(self, rollouts: Rollouts) -> Tensor:
        return torch.arange(len(rollouts)).float()


def test_a_chunk_is_scored_and_referred_while_others_are_sampled() -> None:
    """Each prompt is sampled when the one before is scored and referred: without overlap nobody would go on."""
    scored, referred = threading.Semaphore(0), threading.Semaphore(0)

    class Scorer(NoTies):
        def score(self, rollouts: Rollouts) -> Tensor:
            scored.release()
            return super().score(rollouts)

    class Reference:
        def logps(self, pairs: Pairs) -> PairValues:
            found = small.reference.logps(pairs)
            referred.release()
            return found

    trace = Waiting(lambda number: number > 1, scored, referred)
    small = start(streamed(1, training__train_iters=2), lanes="threads", trace=trace)
    with_scorer(small, Scorer(small.trace))
    small.run = replace(small.run, reference=Reference())  # type: ignore[arg-type]
    finish(small)
    assert not trace.missed


def test_the_first_mini_batch_is_prepared_while_the_last_prompt_is_sampled() -> None:
    """The last prompt of each step waits until the actor has been given the pairs of the first two."""
    trace = Waiting(lambda number: number == SIZE)
    config = streamed(1, training__train_iters=2, actor_rollout__ppo_mini_batch_size=2)
    small = start(config, lanes="threads", trace=trace)
    small.engine.next_prompt = 0
    finish(with_scorer(small, NoTies(small.trace)))
    assert not trace.missed
    assert small.trace.count("prepare") == small.trace.count("update") == 2


@pytest.mark.parametrize(("pairing", "size", "early"), [("best_worst", 3, 1), ("best_worst", 4, 0), ("all", 4, 1)])
def test_nothing_is_prepared_where_the_first_mini_batch_is_the_whole_step(pairing: str, size: int, early: int) -> None:
    """With three samples of each of four prompts ``all`` gives twelve pairs."""
    config = streamed(1, actor_rollout__ppo_mini_batch_size=size, algorithm__pairing=pairing)
    algorithm = ALGORITHMS["ray_online_dpo"]
    assert [stage.name for stage in algorithm.stages(start(config).run)].count("first") == early


@pytest.mark.parametrize("term", [{"scale": "batch"}, {"scale": "running"}, {"scale": "rank"}, {"whole_step": True}])
@pytest.mark.parametrize("lanes", LANES)
def test_what_needs_the_whole_step_waits_for_it(lanes: str, term: dict[str, Any]) -> None:
    plain = start(ahead_config(0))
    finish(with_scorer(plain, TokenCounter(plain.trace), **term))
    small = start(streamed(1), lanes=lanes, trace=Trace(jitter=3))
    scorer = Asked(small.trace)
    finish(with_scorer(small, scorer, **term))
    require_equal(small, plain)
    assert {len(rows) for rows in scorer.rows} == ({SIZE} if "whole_step" in term else {1})


@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize(
    ("shared", "streaming"),
    [
        (["ref", "reward"], {"ref", "reward", "train"}),
        (["train", "ref"], {"reward"}),
        (["infer", "reward"], {"ref", "train"}),
        (["train", "infer", "ref", "reward"], set()),
    ],
)
def test_roles_that_share_devices_do_not_hold_up_trainer_and_engines(
    shared: list[str], streaming: set[str], num_ahead: int
) -> None:
    config = streamed(1, num_ahead, resource_pool__colocate=shared, **HAS_MODEL)
    small = start(config, lanes="threads", trace=Trace(jitter=4))
    assert {role for role in ("ref", "reward", "train") if small.run.streams(role)} == streaming  # type: ignore[arg-type]
    require_equal(finish(small), whole(num_ahead))


def test_reference_and_reward_model_on_the_same_devices_take_turns() -> None:
    busy, met = threading.Lock(), list[str]()

    class Alone:
        def __enter__(self) -> None:
            if not busy.acquire(blocking=False):
                met.append("both are at work")

        def __exit__(self, *_: object) -> None:
            if busy.locked():
                busy.release()

    class Scorer(TokenCounter):
        def score(self, rollouts: Rollouts) -> Tensor:
            with Alone():
                time.sleep(0.002)
                return super().score(rollouts)

    class Reference:
        def logps(self, pairs: Pairs) -> PairValues:
            with Alone():
                time.sleep(0.002)
                return small.reference.logps(pairs)

    small = start(streamed(1, 1, resource_pool__colocate=["ref", "reward"], **HAS_MODEL), lanes="threads")
    with_scorer(small, Scorer(small.trace))
    small.run = replace(small.run, reference=Reference())  # type: ignore[arg-type]
    finish(small)
    assert not met


PLACES = [("part", 3), ("part", 17), ("score", 6), ("score", 13), ("reference", 3), ("reference", 9), ("update", 2)]


@pytest.mark.parametrize(("num_ahead", "lanes"), [(0, "in turn"), (0, "threads"), (1, "threads")])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def test_a_run_that_breaks_down_in_the_middle_of_chunks_goes_on(
    tmp_path: Path, place: tuple[str, int], num_ahead: int, lanes: str
) -> None:
    config = streamed(1, num_ahead)
    trace = Trace(place, break_down, jitter=7 if lanes == "threads" else 0)
    ended = ends_early(start(config, lanes=lanes, trace=trace, root=tmp_path / "first"))
    assert ended.run.state.step < NUM_STEPS
    again = finish(start(config, lanes=lanes, ended=ended, root=tmp_path / "again"))
    require_same(whole(num_ahead), ended, again)


def test_a_step_that_waited_is_scored_in_the_chunks_in_which_it_was_cut(tmp_path: Path) -> None:
    config = streamed(2, 1, training__train_iters=4)
    ended = ends_early(start(config, trace=Trace(("score", 5), break_down), root=tmp_path / "first"))
    small = start(streamed(1, 1, training__train_iters=4), ended=ended)
    scorer = Asked(small.trace)
    finish(with_scorer(small, scorer))
    assert [len(rows) for rows in scorer.rows][:2] == [2, 2]  # sampled by the run before
    assert [len(rows) for rows in scorer.rows][-1] == 1


def test_other_chunks_do_not_change_which_prompts_a_step_has() -> None:
    small = finish(start(streamed(3, 1), lanes="threads"))
    rows = [scored.rollouts.prompts.row_ids.tolist() for scored in small.recorder.scored]
    assert rows == [list(range(step * SIZE, (step + 1) * SIZE)) for step in range(NUM_STEPS)]
