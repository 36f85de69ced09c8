"""Losses of the DPO family on a model: those of whole batches, those without a reference, and what is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.types import Metrics, ReferencedPairs
from rlxf.platform import Process, get_platform
from rlxf.reference.none import NoReference
from rlxf.update.actor import MegatronActor
from rlxf.update.losses import LOSSES
from tests.actors import assert_equal_steps, hf_sums, one_step, weights
from tests.settings import random_pairs, referenced, run_config, without_moments
from tests.tiny_models import save_causal_lm

BETA = 0.1
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo")
Sides = tuple[Tensor, Tensor]  # chosen, rejected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("preference") / "model", tied=True)


def near(folder: Path, count: int, seed: int = 0) -> ReferencedPairs:
    """Pairs with a reference close to the model, so that no loss is at its limits."""
    pairs = random_pairs(count, seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made_up = referenced(pairs, seed).reference
    with torch.no_grad():
        moved = {
            side: hf_sums(model, getattr(pairs, side)) + 0.5 * (getattr(made_up, side) + 40.0)
            for side in ("chosen", "rejected")
        }
    return ReferencedPairs(pairs=pairs, reference=type(made_up)(**moved))


def aot(actor: Sides, reference: Sides) -> Tensor:
    margins = (actor[0] - actor[1]).sort().values - (reference[0] - reference[1]).sort().values
    return -F.logsigmoid(BETA * margins)


def aot_unpaired(actor: Sides, reference: Sides) -> Tensor:
    chosen, rejected = ((a - r).sort().values for a, r in zip(actor, reference, strict=True))
    return -F.logsigmoid(BETA * (chosen - rejected))


def kto_pair(actor: Sides, reference: Sides) -> Tensor:
    chosen, rejected = (a - r for a, r in zip(actor, reference, strict=True))
    up = 1 - torch.sigmoid(BETA * (chosen - rejected.mean().clamp(min=0).detach()))
    down = 1 - torch.sigmoid(BETA * (chosen.mean().clamp(min=0).detach() - rejected))
    return (up + down) / 2


WHOLE: dict[str, Callable[[Sides, Sides], Tensor]] = {"aot": aot, "aot_unpaired": aot_unpaired, "kto_pair": kto_pair}


def hf_step(folder: Path, batch: ReferencedPairs, losses: Callable[[Any], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss, and the gradients that one backward pass through all pairs at once gives; the norm as ``norm``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loss = losses(model).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    return loss.item(), gradients | {"norm": norm}


def assert_a_step_of(folder: Path, found: tuple[Metrics, dict[str, Tensor]], expected: Any) -> None:
    """Adam's first step with a large epsilon, from the gradients of ``hf_step``."""
    loss, gradients = expected
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(float(gradients["norm"]), rel=1e-4)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    scale = min(1.0, 1.0 / float(gradients["norm"]))  # clip_grad is 1
    for name, weight in found[1].items():
        gradient = scale * gradients[name]
        torch.testing.assert_close(weight, start[name] - 0.1 * gradient / (gradient.abs() + 0.1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
def test_a_loss_of_the_whole_batch_equals_one_backward_through_all_pairs(folder: Path, name: str) -> None:
    batch = near(folder, 7)

    def losses(model: Any) -> Tensor:
        actor = hf_sums(model, batch.pairs.chosen), hf_sums(model, batch.pairs.rejected)
        return WHOLE[name](actor, (batch.reference.chosen, batch.reference.rejected))

    found = one_step(folder, "dpo", batch, dpo_loss_type=name, micro_batch_size=2)
    assert_a_step_of(folder, found, hf_step(folder, batch, losses))


@pytest.mark.parametrize("name", [*WHOLE, "sft", "orpo"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_no_loss_depends_on_the_micro_batch(folder: Path, name: str, micro_batch_size: int) -> None:
    """Also in a sum with a loss that needs none but its own pair; sft is a mean over the tokens of all pairs."""
    batch = near(folder, 7)
    settings = {"dpo_loss_type": ("sigmoid", name), "dpo_loss_weights": (0.5, 1.0)}
    whole = one_step(folder, "dpo", batch, micro_batch_size=7, **settings)
    assert_equal_steps(one_step(folder, "dpo", batch, micro_batch_size=micro_batch_size, **settings), whole)


@pytest.mark.parametrize("name", WHOLE)
def test_a_loss_of_the_whole_batch_is_one_of_the_mini_batch(folder: Path, name: str) -> None:
    """What one optimizer step takes, and nothing beyond it: two mini-batches are two losses."""
    batch = near(folder, 6)
    settings = {"dpo_loss_type": name, "lr": 0.0}
    halves = [
        one_step(folder, "dpo", batch.select(torch.arange(start, start + 3)), **settings)[0]["loss"] for start in (0, 3)
    ]
    both = one_step(folder, "dpo", batch, ppo_mini_batch_size=3, **settings)[0]["loss"]
    assert both == pytest.approx(sum(halves) / 2, rel=1e-5)


def free_actor(folder: Path, **settings: Any) -> MegatronActor:
    config = run_config(folder, stage="dpo", **settings)
    assert not config.needs_reference
    return build_actor(config, get_platform("cpu"), Process())


FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Of the log-probabilities per token of chosen and rejected.
    "simpo": lambda c, r: -F.logsigmoid(2.0 * (c - r) - 0.3),
    "orpo": lambda c, r: -c - 2.0 * F.logsigmoid((c - (1 - c.exp()).log()) - (r - (1 - r.exp()).log())),
}


@pytest.mark.parametrize("name", FREE)
def test_a_loss_without_a_reference_equals_plain_hugging_face(folder: Path, name: str) -> None:
    pairs = random_pairs(5)
    batch = ReferencedPairs(pairs=pairs, reference=NoReference().logps(pairs))
    keys = {"dpo_loss_type": name, "dpo_beta": 2.0, "simpo_gamma": 0.3}
    assert not run_config(folder, stage="dpo", **keys).needs_reference

    def losses(model: Any) -> Tensor:
        sides = (pairs.chosen, pairs.rejected)
        return FREE[name](*(hf_sums(model, side) / side.completion_lengths for side in sides))

    found = one_step(folder, "dpo", batch, micro_batch_size=2, **keys)
    assert_a_step_of(folder, found, hf_step(folder, batch, losses))


@pytest.mark.parametrize("name", FREE)
def test_rewards_without_a_reference_are_per_token_and_there_is_no_kl(folder: Path, name: str) -> None:
    pairs = random_pairs(5)
    batch = ReferencedPairs(pairs=pairs, reference=NoReference().logps(pairs))
    trained = free_actor(folder, dpo_loss_type=name, dpo_beta=2.0, ppo_mini_batch_size=5)
    metrics = trained.update(batch, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        sums = hf_sums(model, pairs.chosen), hf_sums(model, pairs.rejected)
    chosen, rejected = (
        s / side.completion_lengths for s, side in zip(sums, (pairs.chosen, pairs.rejected), strict=True)
    )
    assert "objective/kl" not in metrics
    assert metrics["rewards/chosen"] == pytest.approx(2.0 * chosen.mean().item(), rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(2.0 * rejected.mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(2.0 * (chosen - rejected).mean().item(), rel=1e-4, abs=1e-6)
    assert metrics["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["logps/chosen"] == pytest.approx(sums[0].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "kto_pair", "simpo"])
def test_evaluation_is_what_an_update_reports_and_trains_nothing(folder: Path, name: str) -> None:
    batch = near(folder, 6)
    config = run_config(folder, stage="dpo", dpo_loss_type=name, ppo_mini_batch_size=6, micro_batch_size=2)
    trained = build_actor(config, get_platform("cpu"), Process())
    before = weights(trained)
    found = without_moments(trained.evaluate(batch))
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    reported = trained.update(batch, 0)
    assert set(found) == set(reported) - {"grad_norm", "learning_rate", "beta"}
    for key, value in found.items():
        assert value == pytest.approx(reported[key], rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_the_same_online_and_offline(folder: Path, name: str) -> None:
    """ipo when it is told how to count lengths: by itself it divides by them offline only, as TRL does."""
    batch = near(folder, 5)
    keys: dict[str, Any] = {"dpo_loss_type": name, "dpo_label_smoothing": 0.1 if name in SMOOTHED else 0.0}
    keys |= {"dpo_logp_reduction": "sum"} if name == "ipo" else {}
    online, offline = (one_step(folder, stage, batch, **keys) for stage in ("ray_online_dpo", "dpo"))
    assert online[0]["loss"] == offline[0]["loss"]
    assert online[0]["grad_norm"] == offline[0]["grad_norm"] > 0
    assert all(torch.equal(value, offline[1][key]) for key, value in online[1].items())


def test_the_sft_term_is_supervised_fine_tuning_on_the_chosen_side(folder: Path) -> None:
    """``pref_ftx`` is another: the mean over pairs of each chosen side's mean over tokens."""
    batch = near(folder, 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        sums = hf_sums(model, batch.pairs.chosen)
    lengths = batch.pairs.chosen.completion_lengths

    def loss(**settings: Any) -> float:
        return one_step(folder, "dpo", batch, **settings)[0]["loss"]

    plain = loss()
    of_tokens, of_pairs = -float(sums.sum() / lengths.sum()), -float((sums / lengths).mean())
    assert abs(of_tokens - of_pairs) > 1e-3
    sft = loss(dpo_loss_type=("sigmoid", "sft"), dpo_loss_weights=(1.0, 0.3), micro_batch_size=2)
    assert sft - plain == pytest.approx(0.3 * of_tokens, rel=1e-4)
    assert loss(pref_ftx=0.3, micro_batch_size=2) - plain == pytest.approx(0.3 * of_pairs, rel=1e-4)
