"""Failed calls of a scorer: how many completions of a run may stay without a score, and what is said of it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.core.errors import ScoreError, ShapeError
from rlxf.core.types import Rollouts
from rlxf.driver import train
from rlxf.loop.run import State
from rlxf.schedule import InThreads
from rlxf.score.sources import Rewards
from tests.data_world import make_rollouts, prompt_batch
from tests.unit.small_run import TokenCounter, one_source, small_config, small_run

FOUR = make_rollouts(prompt_batch([[5], [6]]), [[[7], [8]], [[9], [10]]])


class Flaky(TokenCounter):
    """Fails in the calls of the given numbers; the first one is 0."""

    def __init__(self, *failing: int, error: type[Exception] = ScoreError) -> None:
        super().__init__([])
        self._failing, self._error, self.calls = failing, error, 0

    def score(self, rollouts: Rollouts) -> Tensor:
        self.calls += 1
        if self.calls - 1 in self._failing:
            raise self._error(f"reward.function=mine.py: `reward` failed: mine.py:{self.calls}: HTTPError: 503")
        return super().score(rollouts)


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def limited(scorer: Any, limit: int, state: State | None = None) -> tuple[Rewards, State]:
    state = state or State()
    return one_source(scorer, state, limit), state


def test_by_default_a_failed_call_ends_the_run_with_its_place() -> None:
    scorer, state = limited(Flaky(0), 0)
    state.step = 899
    with pytest.raises(ScoreError) as raised:
        scorer.score(FOUR).table[:, 0]
    text = str(raised.value)
    assert text.startswith(
        "step 900: reward.function=mine.py: `reward` failed: mine.py:1: HTTPError: 503; 4 completions"
    )
    assert "reward.max_failures = 0" in text


def test_the_completions_of_a_failed_call_have_no_score_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    scorer, state = limited(Flaky(1), 4)
    first, second, third = (scorer.score(FOUR).table[:, 0] for _ in range(3))
    assert second.shape == (4,)
    assert second.dtype == torch.float32
    assert second.isnan().all()
    assert not (first.isnan() | third.isnan()).any()
    assert (state.failed_scores, state.failing_scores) == (0, 4)  # until the step is complete
    (record,) = caplog.records  # one warning per failed call
    expected = (
        "step 1: reward.function=mine.py: `reward` failed: mine.py:2: HTTPError: 503; 4 completions have no score"
    )
    assert record.getMessage().startswith(expected)
    assert "4 of reward.max_failures = 4" in record.getMessage()


def test_the_limit_is_of_the_whole_run_and_of_all_its_scorers() -> None:
    """Training and evaluation share it, and so does a run that goes on with another one's state."""
    training, state = limited(Flaky(0), 11)
    evaluation, _ = limited(Flaky(1), 11, state)
    assert training.score(FOUR).table[:, 0].isnan().all()
    assert not evaluation.score(FOUR).table[:, 0].isnan().any()
    assert evaluation.score(FOUR).table[:, 0].isnan().all()
    resumed, _ = limited(Flaky(0), 11, State(failed_scores=state.failing_scores))
    with pytest.raises(ScoreError, match=r"12 in this run, and reward\.max_failures = 11 allows fewer"):
        resumed.score(FOUR).table[:, 0]


def test_what_ends_the_run_is_not_counted() -> None:
    """Its step is no part of the run: a resumed run does it again."""
    scorer, state = limited(Flaky(0, 1), 4)
    scorer.score(FOUR).table[:, 0]
    with pytest.raises(ScoreError):
        scorer.score(FOUR).table[:, 0]
    assert state.failing_scores == 4


def test_only_a_failure_to_score_is_counted() -> None:
    scorer, _ = limited(Flaky(0, error=ShapeError), 100)
    with pytest.raises(ShapeError):
        scorer.score(FOUR).table[:, 0]


def test_the_error_survives_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ScoreError("step 1: no")))
    assert (type(error), str(error), error.exit_code) == (ScoreError, "step 1: no", 1)


def test_a_step_without_scores_makes_no_pair_and_is_counted() -> None:
    state = State()
    scorer, _ = limited(Flaky(1), 32, state)
    small = small_run(small_config(), scorer=scorer, state=state)
    train(small.run)
    missing = {step: metrics["score/missing"] for step, metrics in small.notes.steps.items()}
    assert missing == {1: 0.0, 2: 32.0, 3: 0.0, 4: 0.0}
    assert small.notes.steps[2]["pair/missing"] == small.notes.steps[2]["pair/dropped"] == 8.0
    assert "loss" not in small.notes.steps[2]
    assert state.failed_scores == 32


def test_failures_of_a_step_are_its_own_while_the_one_before_is_completed() -> None:
    """With lookahead a step is scored in a thread while an earlier one is trained and counted."""
    state = State()

    begun = Event()

    class Meanwhile(Flaky):
        def score(self, rollouts: Rollouts) -> Tensor:
            if self.calls == 0:
                time.sleep(0.2)  # the second step is sampled
            elif self.calls == 1:
                begun.set()
                wait_until(lambda: state.step == 1)
            return super().score(rollouts)

    scorer, _ = limited(Meanwhile(0, 1), 64, state)
    small = small_run(small_config(rollout__lookahead=1), scorer=scorer, state=state, lanes=InThreads)
    write = small.recorder.write

    def record(*step: Any) -> None:
        assert begun.wait(20)
        write(*step)

    small.recorder.write = record  # type: ignore[method-assign]
    train(small.run)
    assert state.step == 4
    assert (state.failed_scores, state.failing_scores) == (64, 0)
    assert [saved.failed_scores for saved in small.folder.states] == [64]


def test_one_failure_more_ends_the_run() -> None:
    state = State()
    scorer, _ = limited(Flaky(1, 3), 63, state)
    small = small_run(small_config(), scorer=scorer, state=state)
    with pytest.raises(ScoreError, match=r"^step 4: .*64 in this run, and reward\.max_failures = 63"):
        train(small.run)
    assert list(small.notes.steps) == [1, 2, 3]
