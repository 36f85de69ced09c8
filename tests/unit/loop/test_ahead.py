"""Sampling ahead of training by k steps: which weights sample which step, whatever runs beside it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.core.types import Rollouts
from rlxf.driver import train
from rlxf.rollout.engine import Sampling
from rlxf.schedule import InThreads
from tests.unit.loop.ahead import (
    EMPTY,
    LANES,
    NUM_STEPS,
    SIZE,
    Trace,
    ahead_config,
    by_hand,
    finish,
    numbers,
    samples,
    start,
)
from tests.unit.small_run import SmallRun, TokenCounter, small_run

AHEAD = (0, 1, 2, 4)


def losses(small: SmallRun) -> list[float | None]:
    return [row.get("loss") for row in numbers(small).values()]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("num_ahead", [*AHEAD, 20])
def test_a_step_trains_on_completions_of_the_weights_of_exactly_k_steps_before(num_ahead: int, lanes: str) -> None:
    config = ahead_config(num_ahead)
    small = finish(start(config, lanes=lanes, trace=Trace(jitter=1)))
    expected, weights = by_hand(config)
    assert losses(small) == expected
    assert torch.equal(small.actor.logits, weights)
    # An empty step makes no version: W(b) is that of the last update before b.
    num_updates = [sum(step not in EMPTY for step in range(boundary)) for boundary in range(NUM_STEPS + 1)]
    assert [set(versions) for _, versions, _ in samples(small).values()] == [
        {num_updates[max(0, step - num_ahead)]} for step in range(NUM_STEPS)
    ]
    assert small.sync.versions == list(range(num_updates[-1] + 1))  # and no push


@pytest.mark.parametrize("num_ahead", AHEAD)
def test_threads_that_meet_in_any_order_change_nothing(num_ahead: int) -> None:
    config = ahead_config(num_ahead)
    in_turn = finish(start(config))
    for jitter in range(2, 6):
        small = finish(start(config, lanes="threads", trace=Trace(jitter=jitter)))
        assert numbers(small) == numbers(in_turn)
        assert samples(small) == samples(in_turn)
        assert torch.equal(small.actor.logits, in_turn.actor.logits)


@pytest.mark.parametrize("lanes", LANES)
def test_prompts_and_seeds_of_a_step_are_those_of_a_run_that_does_not_look_ahead(lanes: str) -> None:
    plain = finish(start(ahead_config(0)))
    for num_ahead in AHEAD[1:]:
        small = finish(start(ahead_config(num_ahead), lanes=lanes, trace=Trace(jitter=num_ahead)))
        assert small.engine.seeds == plain.engine.seeds
        rows = [scored.rollouts.prompts.row_ids.tolist() for scored in small.recorder.scored]
        assert rows == [list(range(step * SIZE, (step + 1) * SIZE)) for step in range(NUM_STEPS)]
        assert small.recorder.steps == list(range(1, NUM_STEPS + 1))  # recorded when their turn came
        assert small.trace.count("rollout") == small.trace.count("score") == NUM_STEPS


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("num_ahead", AHEAD)
def test_the_lag_is_that_of_the_versions_that_sampled(num_ahead: int, lanes: str) -> None:
    small = finish(start(ahead_config(num_ahead), lanes=lanes))
    updates = [sum(step not in EMPTY for step in range(boundary)) for boundary in range(NUM_STEPS)]
    expected = {
        step + 1: updates[step] - updates[max(0, step - num_ahead)] for step in range(NUM_STEPS) if step not in EMPTY
    }
    found = {step: row["sync/version_lag"] for step, row in numbers(small).items() if "sync/version_lag" in row}
    assert found == expected


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("num_ahead", AHEAD)
def test_a_step_uses_the_reference_of_the_boundary_that_sampled_it(num_ahead: int, lanes: str) -> None:
    config = ahead_config(num_ahead, training__eval_interval=0)
    small = start(config, lanes=lanes, trace=Trace(jitter=1))

    class Moves:
        whole = True

        def is_due(self, version: int) -> bool:
            return version % 2 == 0

        def __call__(self, version: int) -> None:
            if self.is_due(version):
                small.reference.logits = small.actor.logits.detach().clone()

    small.run = replace(small.run, refresh=Moves())
    expected, weights = by_hand(config, moves=2)
    assert losses(finish(small)) == expected
    assert torch.equal(small.actor.logits, weights)


@pytest.mark.parametrize("num_ahead", AHEAD[1:])
def test_completions_of_another_version_end_the_run(num_ahead: int) -> None:
    small = small_run(ahead_config(num_ahead), deliver=lambda version: version != 2, lanes=InThreads)
    with pytest.raises(SyncError, match=rf"step {3 + num_ahead}: .* policy version \[1\], but version 2 was pushed"):
        train(small.run)
    assert small.recorder.steps[-1] <= 3


class Waits(TokenCounter):
    """Is at work on a step until the one before is complete; one of its completions has no score each time."""

    def __init__(self) -> None:
        super().__init__([])
        self.small: SmallRun

    def score(self, rollouts: Rollouts) -> Tensor:
        state, step = self.small.run.state, int(rollouts.prompts.row_ids[0]) // SIZE
        state.all_failed_scores += 1
        deadline = time.monotonic() + 10
        while state.step < step and time.monotonic() < deadline:
            time.sleep(0.001)
        return super().score(rollouts)


def test_failed_scores_count_once_also_while_another_step_completes() -> None:
    scorer = Waits()
    config = ahead_config(1, training__eval_interval=0, training__save_interval=0)
    scorer.small = small_run(config, scorer=scorer, lanes=InThreads)
    train(scorer.small.run)
    assert scorer.small.run.state.failed_scores == NUM_STEPS
    assert scorer.small.run.state.failing_scores == 0


def test_sampling_and_scoring_go_on_beside_an_update() -> None:
    """The update waits for the next step to be sampled and scored: in turn it would wait for ever."""
    small = start(ahead_config(1, training__eval_interval=0), lanes="threads")
    met = []

    def wait() -> None:
        wanted = min(small.run.state.step + 2, NUM_STEPS)
        deadline = time.monotonic() + 10
        while small.trace.count("score") < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        met.append(small.trace.count("score") == wanted)

    small.actor.during_update = wait
    finish(small)
    assert all(met)


def test_a_push_waits_for_the_sampling_beside_the_update() -> None:
    """Here sampling always ends last; ``SmallSync`` refuses to push while the engine is busy."""
    small = start(ahead_config(1), lanes="threads")
    done = threading.Event()
    small.engine.during_generate = lambda: time.sleep(0.01)
    small.actor.during_update = done.set
    finish(small)
    assert done.is_set()


def test_a_checkpoint_holds_what_waits_sampled_scored_and_referred() -> None:
    for num_ahead in AHEAD:
        small = finish(start(ahead_config(num_ahead), lanes="threads", trace=Trace(jitter=7)))
        assert [step for step, _ in small.folder.saved] == [3, 6, 8]
        for (boundary, _), waiting in zip(small.folder.saved, small.folder.waiting, strict=True):
            assert waiting == [
                (step, max(0, step - num_ahead), True, True, step not in EMPTY)
                for step in range(boundary, min(boundary + num_ahead, NUM_STEPS))
            ]


def test_the_engines_sample_as_the_recipe_says_in_every_step() -> None:
    small = finish(start(ahead_config(2), lanes="threads"))
    assert small.engine.samplings == [Sampling(num_samples=3, max_new_tokens=8, seed=7, purpose="train")] * NUM_STEPS


@pytest.mark.parametrize("num_ahead", AHEAD)
def test_a_reference_that_is_the_actor_is_asked_before_the_update_of_its_step_and_never_beside_one(
    num_ahead: int,
) -> None:
    """With LoRA it is the actor with its adapters off."""
    config = ahead_config(num_ahead, actor_rollout__lora_r=4)
    small = start(config, lanes="threads", trace=Trace(jitter=9))
    asked: list[int] = []
    small.actor.during_update = lambda: asked.append(small.trace.count("reference"))
    finish(small)
    assert losses(small) == by_hand(config)[0]
    assert asked == list(range(1, NUM_STEPS - len(EMPTY) + 1))
    trained = [event for event in small.trace if event in ("reference", "update")]
    assert trained == ["reference", "update"] * (NUM_STEPS - len(EMPTY))
