"""The loop, on small real objects."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.core.errors import StopRequested, SyncError, TrainingError, WorkerLost
from rlxf.core.types import Metrics, Pairs, Rollouts, Sequences
from rlxf.driver import train
from rlxf.loop.run import State
from rlxf.rollout.engine import Sampling
from tests.unit.small_run import EOS, LIKED, Constant, SmallRun, TokenCounter, small_config, small_run

# docs/metrics.md, without what the real actor adds (tests/unit/update) and the evaluation's (test_evaluate.py).
ONLINE_NAMES = {
    *("rewards/one/mean", "rewards/one/std", "rewards/one/missing"),
    "loss", "epoch", "data/dropped", "num_tokens", "objective/scores", "objective/scores_margin",
    "val/contain_eos_token", "score/missing",
    "pair/kept", "pair/dropped", "pair/missing", "pair/tie_rate", "pair/margin", "rollout/tokens_per_s",
    "pair/length_difference", "rollout/distinct", "score/std", "score/at_max", "score/length_correlation",
    "rollout/longest_over_mean", "rollout/imbalance",
    "sync/bytes", "sync/version_lag",
    "timing/gen", "timing/adv", "timing/ref", "timing/update_actor", "timing/sync", "timing/eval",
    "timing/save", "timing/all",
    "reward/score/mean", "reward/score/max", "reward/score/min",
    "response_length/mean", "response_length/max", "response_length/min",
    "prompt_length/mean", "prompt_length/max", "prompt_length/min",
}  # fmt: skip


def unclocked(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if not name.startswith(("timing/", "rollout/"))}


def mean_score(small: SmallRun, step: int) -> float:
    return float(small.recorder.scored[step].scores.mean())


def test_a_step_goes_through_the_stages_in_order() -> None:
    small = small_run(small_config(training__train_iters=1))
    train(small.run)
    assert small.trace == ["sync", "prompts", "rollout", "score", "reference", "update", "sync"]


def test_the_policy_learns_what_the_scorer_likes() -> None:
    small = small_run(small_config(training__train_iters=40, training__global_batch_size=32))
    train(small.run)
    assert mean_score(small, 39) > 2 * mean_score(small, 0)
    assert float(small.actor.logits.detach()[LIKED].softmax(-1)[LIKED]) > 2 / 6  # 1/6 before training


def test_a_run_repeats_bit_for_bit() -> None:
    losses = []
    for _ in range(2):
        small = small_run(small_config())
        train(small.run)
        losses.append([metrics["loss"] for metrics in small.notes.steps.values()])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


def test_every_step_has_every_metric() -> None:
    small = small_run(small_config())
    train(small.run)
    assert list(small.notes.steps) == [1, 2, 3, 4]
    for metrics in small.notes.steps.values():
        assert set(metrics) == ONLINE_NAMES
    assert small.notes.steps[4]["epoch"] == 2.0
    stages = [
        value
        for name, value in small.notes.steps[1].items()
        if name.startswith("timing/") and name not in ("timing/all", "timing/eval", "timing/save")
    ]
    assert sum(stages) <= small.notes.steps[1]["timing/all"]


def test_tokens_are_counted_over_the_run_and_over_passes() -> None:
    totals = []
    for passes in (1, 3):
        small = small_run(small_config(actor_rollout__ppo_epochs=passes, training__train_iters=2))
        train(small.run)
        kept = [pairing.pairs for pairing in small.recorder.pairings]
        trained = sum(int(pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum()) for pairs in kept)
        assert small.notes.steps[2]["num_tokens"] == passes * trained
        totals.append(trained)
    assert totals[0] > 0


def test_the_missing_eos_penalty_reaches_the_scores() -> None:
    config = small_config(actor_rollout__missing_eos_penalty=10.0, training__train_iters=1)
    small = small_run(config)
    train(small.run)
    scored = small.recorder.scored[0]
    assert 0 < int(scored.contains_eos.sum()) < len(scored)  # max_new_tokens cuts some completions
    difference = scored.raw_scores - scored.scores
    assert difference.tolist() == [0.0 if has else 10.0 for has in scored.contains_eos.tolist()]


def test_the_penalties_for_length_reach_the_scores() -> None:
    plain = small_config(training__train_iters=1)
    keys: dict[str, Any] = {"length_penalty": 0.25, "overlong_tokens": 2, "overlong_penalty": 8.0}
    small = small_run(small_config(training__train_iters=1, **{f"actor_rollout__{k}": v for k, v in keys.items()}))
    train(small.run)
    scored = small.recorder.scored[0]
    lengths = scored.rollouts.sequences.completion_lengths.tolist()
    longest = plain.max_new_tokens
    lost = [0.25 * length + 8.0 * max(0, length - (longest - 2)) / 2 for length in lengths]
    assert longest in lengths
    assert min(lengths) <= longest - 2
    assert (scored.raw_scores - scored.scores).tolist() == pytest.approx(lost)


class EvenPromptsTie(TokenCounter):
    def score(self, rollouts: Rollouts) -> Tensor:
        scores = super().score(rollouts)
        return torch.where(rollouts.prompt_index % 2 == 0, 0.0, scores)


def test_tied_prompts_cost_neither_reference_nor_update() -> None:
    small = small_run(small_config(), scorer=EvenPromptsTie([]))
    train(small.run)
    kept = sum(len(pairing.pairs) for pairing in small.recorder.pairings)
    assert 0 < kept <= 4 * 8 / 2
    assert small.reference.num_pairs == small.actor.num_pairs == kept
    for metrics, pairing in zip(small.notes.steps.values(), small.recorder.pairings, strict=True):
        assert metrics["pair/kept"] + metrics["pair/dropped"] == 8
        assert metrics["pair/kept"] == len(pairing.pairs)
        assert metrics["pair/tie_rate"] >= 0.5


def test_too_many_steps_without_a_pair_end_the_run() -> None:
    small = small_run(small_config(algorithm__max_empty_steps=3, training__train_iters=10), scorer=Constant())
    with pytest.raises(TrainingError, match=r"step 3: 3 steps in a row .*algorithm\.max_empty_steps"):
        train(small.run)
    assert small.actor.num_pairs == 0
    assert small.sync.versions == [0]
    assert "update" not in small.trace
    assert small.notes.steps[2]["pair/tie_rate"] == 1.0
    assert "loss" not in small.notes.steps[2]


class EveryThirdStepScores(TokenCounter):
    calls = 0

    def score(self, rollouts: Rollouts) -> Tensor:
        self.calls += 1
        return super().score(rollouts) * (self.calls % 3 == 0)


def test_empty_steps_count_only_in_a_row_and_are_no_updates() -> None:
    config = small_config(algorithm__max_empty_steps=3, training__train_iters=9)
    small = small_run(config, scorer=EveryThirdStepScores([]))
    train(small.run)
    assert small.sync.versions == [0, 1, 2, 3]
    assert small.run.state.policy_version == 3
    assert small.run.state.step == 9


def test_every_step_samples_as_the_recipe_says() -> None:
    small = small_run(small_config())
    train(small.run)
    assert small.engine.samplings == [Sampling(num_samples=4, max_new_tokens=8, seed=7, purpose="train")] * 4


def test_completions_of_another_version_end_the_run_before_they_are_trained_on() -> None:
    small = small_run(small_config(), deliver=lambda version: version != 2)
    with pytest.raises(SyncError, match=r"step 3: .* sampled by policy version \[1\], but version 2 was pushed"):
        train(small.run)
    assert small.trace.count("update") == 2
    assert small.trace[-1] == "rollout"  # neither scored nor recorded
    assert small.recorder.steps == [1, 2]


def test_lag_is_measured_from_the_versions_that_sampled() -> None:
    """A replay carries the versions of the run that was recorded, which are taken as they are."""
    config = small_config(rollout__engine="replay", rollout__replay_path="rollouts.jsonl")
    small = small_run(config, deliver=lambda version: version % 2 == 0)
    train(small.run)
    assert [metrics["sync/version_lag"] for metrics in small.notes.steps.values()] == [0.0, 1.0, 0.0, 1.0]


class PairFile:
    """The same pair at every step: one liked token against none."""

    def next_batch(self, step: int) -> Pairs:
        prompts = [[2, 2]] * 4
        return Pairs(
            chosen=Sequences.from_rows(prompts, [[LIKED, EOS]] * 4),
            rejected=Sequences.from_rows(prompts, [[4, EOS]] * 4),
        )

    def epoch(self, step: int) -> float:
        return float(step + 1)

    num_dropped = 0


def test_offline_is_the_same_loop_on_pairs_from_a_file() -> None:
    small = small_run(small_config(training__stage="dpo", training__train_iters=5), offline=PairFile())
    train(small.run)
    assert "rollout" not in small.trace
    assert small.trace.count("update") == 5
    losses = [metrics["loss"] for metrics in small.notes.steps.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert not {"objective/scores", "sync/version_lag", "pair/kept"} & set(small.notes.steps[1])


def test_checkpoints_are_made_at_the_interval_and_at_the_end_but_not_twice() -> None:
    for iterations, expected in ((5, [(2, 2), (4, 4), (5, 5)]), (4, [(2, 2), (4, 4)])):
        small = small_run(small_config(training__train_iters=iterations, training__save_interval=2))
        train(small.run)
        assert small.folder.saved == expected
        assert small.notes.policy is not None


def test_evaluations_come_before_the_first_step_and_with_the_metrics_of_their_step() -> None:
    asked: list[int] = []

    def evaluate(step: int) -> Metrics:
        asked.append(step)
        return {"eval/reward": float(step)}

    small = small_run(small_config(training__train_iters=2), evaluate=evaluate)
    train(small.run)
    assert asked == [0, 1, 2]
    assert small.notes.evaluations == {0: {"eval/reward": 0.0}}
    assert [metrics["eval/reward"] for metrics in small.notes.steps.values()] == [1.0, 2.0]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_a_rollout_drops_the_step_and_saves_the_ones_before() -> None:
    small = small_run(small_config())
    small.engine.during_generate = lambda: interrupt() if small.run.state.step == 2 else None
    with small.stop.installed(), pytest.raises(StopRequested) as caught:
        train(small.run)
    assert caught.value.exit_code == 130
    assert small.folder.saved == [(2, 2)]
    assert small.trace[-1] == "rollout"
    assert list(small.notes.steps) == [1, 2]


def test_a_signal_during_an_update_lets_the_step_end_and_saves_it() -> None:
    small = small_run(small_config())
    small.actor.during_update = lambda: interrupt() if small.run.state.step == 2 else None
    with small.stop.installed(), pytest.raises(StopRequested):
        train(small.run)
    assert small.folder.saved == [(3, 3)]
    assert small.trace[-2:] == ["update", "sync"]
    assert list(small.notes.steps) == [1, 2, 3]  # the step's numbers are not lost


@pytest.mark.parametrize(("signalled", "code"), [(True, 130), (False, 1)])
def test_a_worker_that_the_signal_has_ended_too_is_an_end_by_the_signal(signalled: bool, code: int) -> None:
    """Who sends it to every process of a job meant the job."""

    def lost() -> None:
        if small.run.state.step == 2:
            if signalled:
                interrupt()
            raise WorkerLost("lost train rank 0")

    small = small_run(small_config())
    small.actor.during_update = lost
    with small.stop.installed(), pytest.raises(WorkerLost) as caught:
        train(small.run)
    assert caught.value.exit_code == code


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run() -> None:
    stopping = [True]

    def evaluate(step: int) -> Metrics:
        if step == 2 and stopping.pop():
            interrupt()
        return {"eval/reward": float(step)}

    changes = {"training__save_hf_interval": 2, "training__train_iters": 3}
    small = small_run(small_config(**changes), evaluate=evaluate)
    with small.stop.installed(), pytest.raises(StopRequested):
        train(small.run)
    assert "eval/reward" not in small.notes.steps[2]
    assert (small.run.state.owed, small.run.state.reported_step) == (("evaluation", "row", "hf"), 1)
    assert (small.folder.saved, small.folder.hf) == ([(2, 2)], [])
    stopping.append(False)
    again = small_run(small_config(**changes), evaluate=evaluate, state=small.run.state)
    train(again.run)
    assert unclocked(again.notes.steps[2]) == unclocked(small.notes.steps[2]) | {"eval/reward": 2.0}
    assert list(again.notes.steps) == [2, 3]
    assert again.notes.evaluations == {2: {}}  # none before the first step: that was the first run's
    assert (again.folder.saved, again.folder.hf) == ([(3, 3)], [2])


def test_a_resumed_run_goes_on_at_its_step_with_its_version() -> None:
    whole = small_run(small_config())
    train(whole.run)
    first = small_run(small_config(training__train_iters=2))
    train(first.run)
    again = small_run(small_config(), state=first.run.state, logits=first.actor.logits)
    train(again.run)
    assert again.sync.versions == [2, 3, 4]
    assert again.engine.seeds == whole.engine.seeds[2:]
    assert unclocked(again.notes.steps[4]) == unclocked(whole.notes.steps[4])
    assert bool((again.actor.logits == whole.actor.logits).all())


def test_a_run_whose_steps_are_done_only_writes_its_policy() -> None:
    small = small_run(small_config(), state=State(step=4, policy_version=4))
    train(small.run)
    assert small.trace == ["sync"]
    assert small.folder.saved == []
    assert small.notes.policy is not None


def test_a_run_that_fails_waits_for_the_checkpoint_that_is_being_written() -> None:
    small = small_run(small_config(algorithm__max_empty_steps=2), scorer=Constant())
    with pytest.raises(TrainingError):
        train(small.run)
    assert small.folder.finished == [True]


def test_a_signal_before_the_first_step_saves_nothing() -> None:
    small = small_run(small_config())
    small.engine.during_generate = interrupt
    with small.stop.installed(), pytest.raises(StopRequested):
        train(small.run)
    assert small.folder.saved == []


class FailsThree(TokenCounter):
    """Three completions of each step have no score because a call failed."""

    def __init__(self, state: State) -> None:
        super().__init__([])
        self._state = state

    def score(self, rollouts: Rollouts) -> Tensor:
        self._state.all_failed_scores += 3
        return super().score(rollouts)


def test_failures_of_a_step_that_is_not_complete_are_not_saved() -> None:
    """The resumed run scores it again."""
    state = State(step=1, policy_version=1)
    small = small_run(small_config(), state=state, scorer=FailsThree(state))

    def fail() -> None:
        if state.step == 2:
            raise TrainingError("in the update of step 3")

    small.actor.during_update = fail
    with pytest.raises(TrainingError):
        train(small.run)
    assert [(saved.step, saved.failed_scores) for saved in small.folder.states] == [(2, 3)]
    assert state.failing_scores == 3
