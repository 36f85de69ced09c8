"""Evaluations on held-out pairs and examples: what each pair or token weighs, and when they are due."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.core.types import Examples, Metrics, Pairs, PairValues, ReferencedPairs, RewardPairs, Sequences
from rlxf.evaluate import OfflineEvaluation
from rlxf.update.losses import LossSettings, WeightedLoss
from rlxf.update.objective import moments
from tests.unit.small_run import Bigram, small_config

BETA = 0.5
LOSS = WeightedLoss(names=("sigmoid",), weights=(1.0,), settings=LossSettings(beta=BETA))


class Learner(Bigram):
    """A bigram model that evaluates itself with the losses of the stages."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.sizes: list[int] = []

    def evaluate(self, batch: ReferencedPairs | RewardPairs | Examples) -> Metrics:
        self.sizes.append(len(batch))
        if isinstance(batch, Examples):
            logps = self.token_logps(batch.sequences).double() * batch.counted
            sizes = batch.sequences.completion_lengths.tolist()
            losses = torch.stack([-part.sum() for part in logps.split(sizes)])
            counts = torch.stack([part.sum() for part in batch.counted.split(sizes)])
            return {"loss": float(losses.sum() / counts.sum()), **moments(losses, counts)}
        if isinstance(batch, RewardPairs):
            margins = batch.margin
            return {
                "accuracy": float((margins > 0).float().mean()),
                "margin": float(margins.mean()),
                "min_reward": float(margins.min()),
                "max_reward": float(margins.max()),
            }
        logps, reference = self.logps(batch.pairs), batch.reference
        losses = LOSS(logps, reference, torch.ones(2 * len(batch)), 1.0)
        chosen = BETA * (logps.chosen - reference.chosen)
        rejected = BETA * (logps.rejected - reference.rejected)
        return {
            "loss": float(losses.mean()),
            "rewards/accuracies": float((chosen > rejected).float().mean()),
            "rewards/margins": float((chosen - rejected).mean()),
            "logps/chosen": float(logps.chosen.mean()),
            **moments(losses, torch.ones_like(losses)),
        }


def random_logits() -> Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(1))


def sides(count: int, seed: int) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, 6, (int(torch.randint(1, 7, (1,), generator=draw)),), generator=draw) for _ in range(count)
    ]
    return Sequences.from_rows([[2, 3]] * count, [row.tolist() for row in rows])


def pairs(count: int) -> Pairs:
    return Pairs(chosen=sides(count, 2), rejected=sides(count, 3))


def parts(count: int, *sizes: int) -> list[Tensor]:
    assert sum(sizes) == count
    return list(torch.arange(count).split(list(sizes)))


def config(**training: Any) -> Any:
    wanted = {"stage": "dpo", "eval_interval": 2, "train_iters": 5, **training}
    return small_config(**{f"training__{name}": value for name, value in wanted.items()})


def test_it_is_due_before_the_first_step_at_the_interval_and_after_the_last_step() -> None:
    evaluate = OfflineEvaluation(config().training, [pairs(3)], Learner(random_logits()), Bigram())
    assert [bool(evaluate(step)) for step in range(6)] == [True, False, True, False, True, True]


def test_it_is_due_whenever_a_run_only_evaluates() -> None:
    evaluate = OfflineEvaluation(
        config(eval_interval=0, eval_only=True).training, [pairs(3)], Learner(random_logits()), Bigram()
    )
    assert evaluate(3)


def test_a_model_that_is_its_own_reference_has_no_margin_and_the_loss_of_a_coin() -> None:
    learner = Learner(random_logits())
    metrics = OfflineEvaluation(config().training, [pairs(5)], learner, learner)(0)
    assert metrics["eval/loss"] == pytest.approx(math.log(2))
    assert metrics["eval/rewards/margins"] == 0.0
    assert metrics["eval/rewards/accuracies"] == 0.0


def test_every_pair_weighs_the_same_whatever_the_size_of_the_batches() -> None:
    all_pairs, learner = pairs(7), Learner(random_logits())
    whole = OfflineEvaluation(config().training, [all_pairs], learner, Bigram())(0)
    cut = [all_pairs.select(rows) for rows in parts(7, 4, 2, 1)]
    split = OfflineEvaluation(config().training, cut, learner, Bigram())(0)
    assert learner.sizes == [7, 4, 2, 1]
    assert split == pytest.approx(whole, rel=1e-6)
    assert whole["eval/rewards/margins"] != 0


def test_every_counted_token_weighs_the_same_in_supervised_fine_tuning() -> None:
    sequences = sides(6, 4)
    counted = torch.rand(int(sequences.completion_lengths.sum()), generator=torch.Generator().manual_seed(5)) < 0.5
    examples, learner = Examples(sequences=sequences, counted=counted), Learner(random_logits())
    whole = OfflineEvaluation(config(stage="sft").training, [examples], learner, Bigram())(0)
    cut = [examples.select(rows) for rows in parts(6, 1, 5)]
    split = OfflineEvaluation(config(stage="sft").training, cut, learner, Bigram())(0)
    assert split["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-6)


@pytest.mark.parametrize("sizes", [(9,), (4, 3, 2)])
def test_standard_errors_are_those_of_pairs_whatever_the_size_of_the_batches(sizes: tuple[int, ...]) -> None:
    all_pairs, model, reference = pairs(9), Learner(random_logits()), Bigram()
    batches = [all_pairs.select(rows) for rows in parts(9, *sizes)]
    found = OfflineEvaluation(config().training, batches, model, reference)(0)
    losses = LOSS(model.logps(all_pairs), reference.logps(all_pairs), torch.ones(18), 1.0).double()
    assert found["eval/loss_se"] == pytest.approx(float(losses.std()) / 3, rel=1e-5)
    share = found["eval/rewards/accuracies"]
    hits = torch.tensor([1.0] * round(9 * share) + [0.0] * round(9 * (1 - share)))
    assert 0 < share < 1
    assert found["eval/rewards/accuracies_se"] == pytest.approx(float(hits.std()) / 3)
    assert not [name for name in found if "moments" in name]


def test_the_standard_error_of_supervised_fine_tuning_is_that_of_whole_examples() -> None:
    """Tokens of one example are alike: an example that is there twice halves nothing but the number of examples."""
    sequences = sides(40, 4)
    counted = torch.rand(int(sequences.completion_lengths.sum()), generator=torch.Generator().manual_seed(5)) < 0.8
    examples, learner = Examples(sequences=sequences, counted=counted), Learner(random_logits())
    batches = [examples.select(rows) for rows in parts(40, 33, 7)]
    found = OfflineEvaluation(config(stage="sft").training, batches, learner, Bigram())(0)
    draws = torch.randint(0, 40, (2000, 40), generator=torch.Generator().manual_seed(6))
    one_each = [learner.evaluate(examples.select(torch.tensor([row]))) for row in range(40)]
    counts = torch.tensor([float(part.sum()) for part in counted.split(sequences.completion_lengths.tolist())])
    losses = torch.tensor([0.0 if math.isnan(one["loss"]) else one["loss"] for one in one_each]) * counts
    bootstrap = losses[draws].sum(dim=1) / counts[draws].sum(dim=1)
    assert found["eval/loss_se"] == pytest.approx(float(bootstrap.std()), rel=0.1)


def test_one_pair_has_no_standard_error() -> None:
    found = OfflineEvaluation(config().training, [pairs(1)], Learner(random_logits()), Bigram())(0)
    assert math.isnan(found["eval/loss_se"])
    assert math.isnan(found["eval/rewards/accuracies_se"])


def test_smallest_and_largest_reward_are_those_of_all_batches() -> None:
    both = pairs(4)
    rewards = RewardPairs(chosen=both.chosen, rejected=both.rejected, margin=torch.tensor([-1.0, 4.0, 2.0, 0.5]))
    batches = [rewards.select(rows) for rows in parts(4, 3, 1)]
    assert OfflineEvaluation(config(stage="rm").training, batches, Learner(random_logits()), Bigram())(0) == {
        "eval/accuracy": pytest.approx(0.75),
        "eval/accuracy_se": pytest.approx(torch.tensor([0.0, 1.0, 1.0, 1.0]).std().item() / 2),
        "eval/margin": pytest.approx(1.375),
        "eval/min_reward": -1.0,
        "eval/max_reward": 4.0,
    }


def test_the_reference_is_asked_for_its_log_probs_of_pairs_only() -> None:
    class Refuses:
        def logps(self, pairs: Pairs) -> PairValues:
            raise AssertionError("a reward model has no reference")

        def token_logps(self, sequences: Sequences) -> Tensor:
            raise AssertionError("nor has it completions")

    both = pairs(2)
    rewards = RewardPairs(chosen=both.chosen, rejected=both.rejected, margin=torch.ones(2))
    learner = Learner(random_logits())
    assert OfflineEvaluation(config(stage="rm").training, [rewards], learner, Refuses())(0)["eval/accuracy"] == 1.0
    with pytest.raises(AssertionError, match="no reference"):
        OfflineEvaluation(config().training, [both], learner, Refuses())(0)


def test_a_batch_without_a_counted_token_weighs_nothing() -> None:
    sequences = sides(2, 4)
    total = int(sequences.completion_lengths.sum())
    nothing = Examples(sequences=sequences, counted=torch.zeros(total, dtype=torch.bool))
    something = replace(nothing, counted=torch.ones(total, dtype=torch.bool))
    learner = Learner(random_logits())

    def of(*batches: Examples) -> Metrics:
        return OfflineEvaluation(config(stage="sft").training, batches, learner, Bigram())(0)

    assert of(nothing, something) == of(something)
    assert math.isnan(of(nothing)["eval/loss"])


def test_pairs_are_told_the_beta_that_holds_when_they_are_evaluated() -> None:
    told: list[float | None] = []

    class Noting(Learner):
        def evaluate(self, batch: ReferencedPairs) -> Metrics:  # type: ignore[override]
            told.append(batch.beta)
            return super().evaluate(batch)

    betas = iter([0.3, 0.1])
    evaluate = OfflineEvaluation(
        config().training, [pairs(3)], Noting(random_logits()), Bigram(), beta=lambda: next(betas)
    )
    evaluate(0)
    evaluate(2)
    assert told == [0.3, 0.1]
