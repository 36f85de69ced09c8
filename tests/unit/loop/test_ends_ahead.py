"""A run that looks ahead ends early, wherever it is: the one that goes on does what was left, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from rlxf.core.errors import StopRequested, TrainingError
from rlxf.core.types import Metrics, Pairs, ReferencedPairs, Sequences
from rlxf.driver import train
from rlxf.schedule import InThreads
from tests.unit.loop.ahead import (
    EMPTY,
    LANES,
    NUM_STEPS,
    Trace,
    ahead_config,
    break_down,
    ends_early,
    finish,
    numbers,
    references,
    require_same,
    samples,
    start,
)
from tests.unit.small_run import SmallRun

AHEAD = (0, 1, 2, 4)
RUNS = [(0, "in turn"), *((num_ahead, lanes) for num_ahead in AHEAD[1:] for lanes in LANES)]
# Every event of a run, and two of each kind: (name, how many came before).
PLACES = [
    *(("prompts", 2), ("rollout", 5), ("rollout", 1), ("score", 3), ("score", 6), ("reference", 1), ("reference", 4)),
    *(("update", 0), ("update", 3), ("sync", 1), ("sync", 4), ("evaluation", 1), ("evaluation", 3), ("save", 0)),
]


@cache
def undisturbed(num_ahead: int, shown: int = 0) -> SmallRun:
    return finish(start(ahead_config(num_ahead), shown=shown))


@pytest.mark.parametrize(("num_ahead", "lanes"), RUNS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def test_a_run_that_breaks_down_and_goes_on_equals_one_that_nothing_disturbed(
    tmp_path: Path, place: tuple[str, int], num_ahead: int, lanes: str
) -> None:
    config = ahead_config(num_ahead)
    trace = Trace(place, break_down, jitter=3 if lanes == "threads" else 0)
    ended = ends_early(start(config, lanes=lanes, trace=trace, root=tmp_path / "first", shown=2))
    require_last_step(ended)
    again = start(config, lanes=lanes, ended=ended, root=tmp_path / "again", shown=2)
    known = sum(step.shown is not None and step.reference is not None for step in again.run.steps)
    assert known == sum(referred for *_, referred in (ended.folder.waiting[-1] if ended.folder.waiting else []))
    finish(again)
    assert again.reference.num_shown == len(references(again)) - known
    whole = undisturbed(num_ahead, 2)
    assert len(references(whole)) == NUM_STEPS - len(EMPTY)
    require_same(whole, ended, again)
    require_nothing_twice(ended, again)


def require_last_step(ended: SmallRun) -> None:
    """What is saved is the last complete step."""
    state = ended.run.state
    assert [step for step, _ in ended.folder.saved][-1:] == ([state.step] if state.step else [])
    assert state.step <= ended.trace.count("update") + len(EMPTY)


def require_nothing_twice(ended: SmallRun, again: SmallRun) -> None:
    """What a checkpoint holds is neither sampled nor scored again, nor is the reference asked again."""
    waiting = ended.folder.waiting[-1] if ended.folder.waiting else []
    step = ended.folder.states[-1].step if ended.folder.states else 0
    empty = sum(number >= step for number in EMPTY)
    left = NUM_STEPS - step
    assert again.trace.count("rollout") == left - sum(sampled for _, _, sampled, _, _ in waiting)
    assert again.trace.count("score") == left - sum(scored for *_, scored, _ in waiting)
    assert again.trace.count("reference") == left - empty - sum(referred for *_, referred in waiting)
    cut = [item for item in waiting if not item[2]]
    assert again.trace.count("push saved") == bool(cut)
    assert all(boundary < step for _, boundary, sampled, _, _ in waiting if not sampled)


@pytest.mark.parametrize(("num_ahead", "lanes"), RUNS)
@pytest.mark.parametrize("event", ["prompts", "rollout", "score", "reference", "update", "sync", "evaluation", "save"])
def test_a_run_that_a_signal_stops_and_that_goes_on_equals_one_that_nothing_disturbed(
    tmp_path: Path, event: str, num_ahead: int, lanes: str
) -> None:
    config = ahead_config(num_ahead)
    place = (event, 1 if event in ("evaluation", "save") else 3)
    trace = Trace(place, lambda: os.kill(os.getpid(), signal.SIGTERM), jitter=5 if lanes == "threads" else 0)
    ended = ends_early(start(config, lanes=lanes, trace=trace, root=tmp_path / "first"), StopRequested)
    assert ended.run.state.step < NUM_STEPS
    require_last_step(ended)
    again = finish(start(config, lanes=lanes, ended=ended, root=tmp_path / "again"))
    require_same(undisturbed(num_ahead), ended, again)
    require_nothing_twice(ended, again)


@pytest.mark.parametrize("num_ahead", AHEAD[1:])
def test_a_run_may_break_down_again_and_again(tmp_path: Path, num_ahead: int) -> None:
    """Also before it has completed a step, so that it leaves nothing of its own."""
    config, last = ahead_config(num_ahead), None
    rows, recorded = dict[int, Metrics](), dict[int, object]()
    events = ["sync", "rollout", "push saved", "update", "sync", "score", "rollout", "reference", "update", ""]
    for number, event in enumerate(events):
        at = (event, 0 if event == "push saved" else 1)
        trace = Trace(at, break_down, jitter=number + 1)
        small = start(config, lanes="threads", trace=trace, ended=last, root=tmp_path / str(number))
        with suppress(TrainingError):  # there may be no such event any more
            train(small.run)
        state = small.run.state
        rows |= {step: row for step, row in numbers(small).items() if step <= state.reported_step}
        recorded |= {step: row for step, row in samples(small).items() if step <= state.step}
        last = small if small.folder.states else last
    whole = undisturbed(num_ahead)
    assert (rows, recorded) == (numbers(whole), samples(whole))
    assert last is not None
    assert torch.equal(last.actor.logits, whole.actor.logits)


@pytest.mark.parametrize(("num_ahead", "cut"), [(1, 6), (2, 5), (4, 6)])
def test_a_step_that_is_cut_while_it_is_sampled_is_sampled_again_by_the_same_weights(
    tmp_path: Path, num_ahead: int, cut: int
) -> None:
    """The actor has newer ones: the update beside it is complete."""
    config, boundary = ahead_config(num_ahead), cut - num_ahead

    def break_after_the_update() -> None:
        deadline = time.monotonic() + 10
        while small.run.state.step <= boundary and time.monotonic() < deadline:
            time.sleep(0.001)
        break_down()

    trace = Trace(("rollout", cut), break_after_the_update)
    small = start(config, lanes="threads", trace=trace, root=tmp_path / "first")
    ended = ends_early(small)
    assert ended.folder.states[-1].step == boundary + 1
    assert "push" in ended.folder.states[-1].owed
    waiting = ended.folder.waiting[-1]
    assert [step for step, *_ in waiting] == list(range(boundary + 1, cut + 1))
    assert waiting[-1] == (cut, boundary, False, False, False)
    again = finish(start(config, lanes="threads", ended=ended))
    assert [event for event in again.trace if event in ("push saved", "rollout", "sync")][:3] == [
        "push saved",
        "rollout",
        "sync",
    ]
    require_same(undisturbed(num_ahead), ended, again)


@pytest.mark.parametrize(("num_ahead", "lanes"), RUNS)
def test_after_half_an_update_the_run_goes_on_from_the_checkpoint_before_it(
    tmp_path: Path, num_ahead: int, lanes: str
) -> None:
    config = ahead_config(num_ahead)
    small = start(config, lanes=lanes, trace=Trace(("update", 3), break_down), root=tmp_path)
    small.actor.untouched = lambda: False
    ended = ends_early(small)
    assert [step for step, _ in ended.folder.saved] == [3]
    assert ended.run.state.step == 5  # two of them are lost, and made again
    again = finish(start(config, lanes=lanes, ended=ended))
    assert again.notes.steps[4].keys() == undisturbed(num_ahead).notes.steps[4].keys()
    whole = undisturbed(num_ahead)
    assert numbers(again) == {step: row for step, row in numbers(whole).items() if step > 3}
    assert samples(again) == {step: row for step, row in samples(whole).items() if step > 3}


@pytest.mark.parametrize("now", AHEAD)
@pytest.mark.parametrize("then", AHEAD)
def test_another_number_of_steps_ahead_applies_to_what_is_not_sampled_yet(tmp_path: Path, then: int, now: int) -> None:
    """Steps that wait are trained on as they were sampled; the formula of the rest begins at the resumed step."""
    trace = Trace(("sync", 3), break_down)  # after the update of step 3, counted from 0: steps 1 and 4 have none
    ended = ends_early(start(ahead_config(then), trace=trace, root=tmp_path))
    first = ended.folder.states[-1].step
    again = finish(start(ahead_config(now), lanes="threads", ended=ended))
    updates = [sum(step not in EMPTY for step in range(boundary)) for boundary in range(NUM_STEPS)]
    waiting = {step: boundary for step, boundary, *_ in ended.folder.waiting[-1]}
    expected = {step: waiting.get(step, max(first, step - now)) for step in range(first, NUM_STEPS)}
    found = {step - 1: versions for step, (_, versions, _) in samples(again).items()}
    assert {step: set(versions) for step, versions in found.items()} == {
        step: {updates[boundary]} for step, boundary in expected.items()
    }
    assert len(waiting) == then


@pytest.mark.parametrize("num_ahead", AHEAD)
def test_more_steps_after_a_finished_run_begin_with_nothing_that_waits(tmp_path: Path, num_ahead: int) -> None:
    """So they are not those of one longer run."""
    ended = finish(start(ahead_config(num_ahead), lanes="threads", root=tmp_path))
    assert ended.folder.waiting[-1] == []
    config = ahead_config(num_ahead, training__train_iters=NUM_STEPS + 4)
    again = finish(start(config, lanes="threads", ended=ended))
    updates = NUM_STEPS - len(EMPTY)
    assert [set(versions) for _, versions, _ in samples(again).values()] == [
        {updates + max(0, step - num_ahead)} for step in range(4)
    ]


@pytest.mark.parametrize("num_steps", [4, 5])
def test_a_resumed_run_that_is_to_be_shorter_ends_there(tmp_path: Path, num_steps: int) -> None:
    ended = ends_early(start(ahead_config(4), lanes="threads", trace=Trace(("sync", 2), break_down), root=tmp_path))
    assert [step for step, *_ in ended.folder.waiting[-1]] == [3, 4, 5, 6]
    again = finish(start(ahead_config(4, training__train_iters=num_steps), lanes="threads", ended=ended))
    assert again.trace.count("rollout") == again.trace.count("push saved") == 0
    assert samples(again) == {step: row for step, row in samples(undisturbed(4)).items() if 3 < step <= num_steps}


def test_what_is_under_way_is_left_before_a_first_step_is_complete() -> None:
    closed = list[bool]()

    class Noted(InThreads):
        def close(self) -> None:
            super().close()
            closed.append(True)

    small = start(ahead_config(1), trace=Trace(("score", 0), break_down))
    small.run = replace(small.run, lanes=Noted(small.stop))
    ends_early(small)
    assert closed == [True]
    assert small.folder.saved == []


@pytest.mark.parametrize("changes", [{"algorithm__min_score_margin": 1.5}, {"actor_rollout__missing_eos_penalty": 3.0}])
def test_the_reference_is_asked_again_where_a_changed_recipe_makes_other_pairs(
    tmp_path: Path, changes: dict[str, float]
) -> None:
    """What waits keeps its completions and raw scores; its pairs are made when it is taken."""
    ended = ends_early(start(ahead_config(2), trace=Trace(("sync", 3), break_down), root=tmp_path, shown=2))
    assert [referred for *_, referred in ended.folder.waiting[-1]] == [False, True]  # the first one is empty
    again = start(ahead_config(2, **changes), ended=ended, shown=2)
    asked: list[Pairs] = []
    logps = again.reference.logps
    again.reference.logps = lambda pairs: asked.append(pairs) or logps(pairs)
    trained: list[ReferencedPairs] = []
    update = again.actor.update
    again.actor.update = lambda batch, step: trained.append(batch) or update(batch, step)
    finish(again)
    for batch in trained:
        assert torch.equal(batch.reference.chosen, logps(batch.pairs).chosen)
        assert torch.equal(batch.reference.rejected, logps(batch.pairs).rejected)
    assert len(asked) == len(trained)  # of the one that was referred, too
    said = references(again)
    for step, pairing in zip(again.recorder.steps, again.recorder.pairings, strict=True):
        pairs = again.recorder.shown(step, pairing.pairs)
        if len(pairs):
            tokens = again.reference.token_logps(Sequences.concat([pairs.chosen, pairs.rejected]))
            assert said[step] == tokens.tolist()
