"""What a step collects, stage by stage, and that the driver asks no one else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlxf.algorithms import ALGORITHMS, Algorithm
from rlxf.algorithms.online_dpo import OnlineDpo
from rlxf.core.types import Batch, Examples, OnlinePairs, Pairs, PairValues, RewardPairs, Sequences
from rlxf.driver import train
from rlxf.loop.collected import Collected
from rlxf.loop.run import Reference, Run
from rlxf.pair import PAIRINGS, PairingSettings
from rlxf.schedule import Stage
from tests.settings import random_examples, random_pairs, random_reward_pairs
from tests.unit.small_run import Constant, small_config, small_run


@dataclass
class Counts:
    """A reference that notes how many pairs it was asked about."""

    asked: int = 0

    def logps(self, pairs: Pairs) -> PairValues:
        self.asked += len(pairs)
        return PairValues(chosen=torch.full((len(pairs),), -1.0), rejected=torch.full((len(pairs),), -2.0))

    def token_logps(self, sequences: Sequences) -> Tensor:
        raise AssertionError("nobody asks for tokens")


@dataclass(frozen=True)
class Rows:
    """A file."""

    data: Pairs | Examples

    def next_batch(self, step: int) -> Pairs | Examples:
        return self.data

    def epoch(self, step: int) -> float:
        return (step + 1) / 4

    num_dropped = 3


def collect(algorithm: Algorithm, run: Run, step: int) -> Collected:
    """A step after all its stages, each of which is done only then."""
    collected = Collected(step=step, sampled_at=step, version=0)
    for stage in algorithm.stages(run):
        assert not stage.is_done(collected)
        stage.work(collected)
        assert stage.is_done(collected)
    return collected


@pytest.mark.parametrize(
    ("stage", "data"),
    [("dpo", random_pairs(3)), ("rm", random_reward_pairs(3)), ("sft", random_examples(3))],
)
def test_a_file_stage_trains_on_what_its_file_holds(stage: str, data: Pairs | Examples) -> None:
    small = small_run(small_config(training__stage=stage), offline=Rows(data))
    reference = Counts()
    run = replace(small.run, reference=reference)
    collected = collect(ALGORITHMS[run.config.training.stage], run, 1)
    assert collected.data is data
    assert collected.metrics == {"epoch": 0.5, "data/dropped": 3.0}
    assert reference.asked == (3 if stage == "dpo" else 0)


@pytest.mark.parametrize("stage", ["ray_online_dpo", "dpo"])
def test_preferences_are_compared_with_the_reference(stage: str) -> None:
    reference, pairs = Counts(), random_pairs(3)
    batch = ALGORITHMS[stage].batch(pairs, reference)  # type: ignore[index]
    assert (batch.pairs, batch.reference.chosen.tolist()) == (pairs, [-1.0] * 3)  # type: ignore[union-attr]
    assert reference.asked == 3


@pytest.mark.parametrize(("stage", "data"), [("rm", random_reward_pairs(3)), ("sft", random_examples(3))])
def test_the_other_stages_need_no_reference(stage: str, data: RewardPairs | Examples) -> None:
    reference = Counts()
    assert ALGORITHMS[stage].batch(data, reference) is data  # type: ignore[index]
    assert reference.asked == 0


def test_the_step_that_is_collected_is_the_one_that_is_asked_for() -> None:
    """Not the one that the run is at: sampling may be ahead of training."""
    small = small_run(small_config())
    collected = collect(OnlineDpo(), small.run, 2)
    data, metrics = collected.data, collected.metrics
    assert isinstance(data, OnlinePairs)
    assert set(data.row_ids.tolist()) <= set(range(16, 24))  # eight prompts a step
    assert len(data) == metrics["pair/kept"] > 0
    assert metrics["epoch"] == 1.5
    assert small.recorder.steps == []  # not before its turn
    OnlineDpo().record(small.run, collected)
    assert small.recorder.steps == [3]
    assert small.run.state.step == 0


def test_a_step_without_a_pair_is_collected_without_the_reference() -> None:
    small = small_run(small_config(), scorer=Constant())
    sample, score, refer = OnlineDpo().stages(small.run)
    collected = Collected(step=0, sampled_at=0, version=0)
    for stage in (sample, score):
        stage.work(collected)
    assert refer.is_done(collected)
    assert collected.batch is None
    assert "reference" not in small.trace


@pytest.mark.parametrize(("lora_r", "lane", "late"), [(0, "ref", False), (4, "train", True)])
def test_the_trainer_is_asked_only_where_it_holds_the_reference(lora_r: int, lane: str, late: bool) -> None:
    """With LoRA the reference is the actor without its adapters."""
    *_, refer = OnlineDpo().stages(small_run(small_config(actor_rollout__lora_r=lora_r)).run)
    assert (refer.lane, refer.late) == (lane, late)


class FirstPairOnly(OnlineDpo):
    """What somebody may add: an algorithm in a file of its own."""

    def stages(self, run: Run) -> tuple[Stage[Collected], ...]:
        sample, score, refer = super().stages(run)

        def first_pair(collected: Collected) -> None:
            score.work(collected)
            assert collected.data is not None
            collected.data = collected.data.select(torch.arange(1))
            collected.metrics["pair/kept"] = 1.0

        return sample, replace(score, work=first_pair), refer

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert len(data) == 1
        return super().batch(data, reference)


def test_a_run_asks_the_algorithm_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "ray_online_dpo", FirstPairOnly())
    small = small_run(small_config(training__train_iters=2))
    train(small.run)
    assert small.actor.num_pairs == small.reference.num_pairs == 2
    assert [metrics["pair/kept"] for metrics in small.notes.steps.values()] == [1.0, 1.0]


def test_pairs_are_made_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PairingSettings] = []
    made = PAIRINGS["all"]

    def noted(scored, settings, comparisons=None):  # type: ignore[no-untyped-def]
        asked.append(settings)
        return made(scored, settings, comparisons)

    monkeypatch.setitem(PAIRINGS, "all", noted)
    keys = {"pairing": "all", "min_score_margin": 0.5, "max_pairs_per_prompt": 2, "max_length_ratio": 9.0}
    changes = {f"algorithm__{key}": value for key, value in keys.items()}
    small = small_run(small_config(training__train_iters=2, training__seed=7, **changes))
    train(small.run)
    del keys["pairing"]
    assert asked == [PairingSettings(seed=7, step=step, **keys) for step in range(2)]
