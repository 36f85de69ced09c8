"""The losses against their formulas on paper, written out in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.core.types import PairValues
from rlxf.update.losses import LOSSES, OF_WHOLE_BATCH, LossInputs, LossSettings, WeightedLoss, gradients

CHOSEN, REJECTED = [-12.0, -20.0, -7.5, -30.0], [-14.0, -16.0, -9.0, -33.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -18.5, -9.0, -29.0], [-13.5, -17.0, -8.0, -30.5]
CHOSEN_LENGTHS, REJECTED_LENGTHS = [6.0, 9.0, 4.0, 15.0], [7.0, 8.0, 3.0, 11.0]
BETA, SMOOTHING, TAU, GAMMA = 0.3, 0.1, 0.05, 0.4
N = len(CHOSEN)


def logps(chosen: list[float], rejected: list[float]) -> PairValues:
    return PairValues(chosen=torch.tensor(chosen), rejected=torch.tensor(rejected))


ACTOR, REFERENCE = logps(CHOSEN, REJECTED), logps(REF_CHOSEN, REF_REJECTED)
LENGTHS = torch.tensor(CHOSEN_LENGTHS + REJECTED_LENGTHS)
MEAN_LENGTH = sum(CHOSEN_LENGTHS) / N


def loss(name: str, *, actor: PairValues = ACTOR, rows: list[int] | None = None, **settings: Any) -> list[float]:
    """What the weighted loss of one name gives, for all pairs or some ``rows`` of them."""
    index = torch.tensor(rows if rows is not None else range(N))
    reduction = settings.pop("reduction", "auto")
    offline = settings.pop("offline", False)
    pref_ftx = settings.pop("pref_ftx", 0.0)
    known = {"beta": BETA, "label_smoothing": 0.0, "discopop_tau": TAU, "simpo_gamma": GAMMA} | settings
    weighted = WeightedLoss(
        names=(name,),
        weights=(1.0,),
        settings=LossSettings(**known),
        reduction=reduction,
        offline=offline,
        pref_ftx=pref_ftx,
    )
    lengths = torch.cat([side[index] for side in LENGTHS.chunk(2)])
    values: list[float] = weighted(actor.select(index), REFERENCE.select(index), lengths, MEAN_LENGTH).tolist()
    return values


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nll(x: float) -> float:
    return -math.log(s(x))


def log_odds(average: float) -> float:
    p = math.exp(average)
    return math.log(p / (1 - p))


def ratios(i: int) -> tuple[float, float]:
    return CHOSEN[i] - REF_CHOSEN[i], REJECTED[i] - REF_REJECTED[i]


def d(i: int) -> float:
    chosen, rejected = ratios(i)
    return chosen - rejected


def averages(i: int) -> tuple[float, float]:
    return CHOSEN[i] / CHOSEN_LENGTHS[i], REJECTED[i] / REJECTED_LENGTHS[i]


def kto(i: int) -> float:
    chosen_kl = max(0.0, sum(ratios(j)[0] for j in range(N)) / N)
    rejected_kl = max(0.0, sum(ratios(j)[1] for j in range(N)) / N)
    return (1 - s(BETA * (ratios(i)[0] - rejected_kl)) + 1 - s(BETA * (chosen_kl - ratios(i)[1]))) / 2


def discopop(i: int) -> float:
    share = s(BETA * d(i) / TAU)
    return nll(BETA * d(i)) * (1 - share) + math.exp(-BETA * d(i)) * share


# Of pair i, as the papers write it.
FORMULAS: dict[str, Callable[[int], float]] = {
    "sigmoid": lambda i: nll(BETA * d(i)),
    "hinge": lambda i: max(0.0, 1 - BETA * d(i)),
    "ipo": lambda i: (d(i) - 1 / (2 * BETA)) ** 2,
    "kto_pair": kto,
    "nca_pair": lambda i: nll(BETA * ratios(i)[0]) + nll(-BETA * ratios(i)[0]) / 2 + nll(-BETA * ratios(i)[1]) / 2,
    "bco_pair": lambda i: nll(BETA * ratios(i)[0]) + nll(-BETA * ratios(i)[1]),
    "sppo_hard": lambda i: (ratios(i)[0] - 1 / (2 * BETA)) ** 2 + (ratios(i)[1] + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda i: 1 - s(BETA * ratios(i)[0]) + s(BETA * ratios(i)[1]),
    "apo_down": lambda i: s(BETA * ratios(i)[0]) + 1 - s(BETA * d(i)),
    "discopop": discopop,
    "sigmoid_norm": lambda i: nll(BETA * (ratios(i)[0] / CHOSEN_LENGTHS[i] - ratios(i)[1] / REJECTED_LENGTHS[i])),
    "simpo": lambda i: nll(BETA * (averages(i)[0] - averages(i)[1]) - GAMMA),
    "orpo": lambda i: -averages(i)[0] + BETA * nll(log_odds(averages(i)[0]) - log_odds(averages(i)[1])),
    "sft": lambda i: -CHOSEN[i] / MEAN_LENGTH,
}
SMOOTHED_FORMULAS: dict[str, Callable[[int], float]] = {
    "sigmoid": lambda i: (1 - SMOOTHING) * nll(BETA * d(i)) + SMOOTHING * nll(-BETA * d(i)),
    "robust": lambda i: ((1 - SMOOTHING) * nll(BETA * d(i)) - SMOOTHING * nll(-BETA * d(i))) / (1 - 2 * SMOOTHING),
    "exo_pair": lambda i: (
        s(BETA * d(i)) * math.log(s(BETA * d(i)) / (1 - SMOOTHING))
        + s(-BETA * d(i)) * math.log(s(-BETA * d(i)) / SMOOTHING)
    ),
    "simpo": lambda i: (
        (1 - SMOOTHING) * nll(BETA * (averages(i)[0] - averages(i)[1]) - GAMMA)
        + SMOOTHING * nll(-BETA * (averages(i)[0] - averages(i)[1]) + GAMMA)
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula(name: str) -> None:
    assert loss(name) == pytest.approx([FORMULAS[name](i) for i in range(N)], rel=2e-5)


@pytest.mark.parametrize("name", SMOOTHED_FORMULAS)
def test_the_smoothed_loss_is_the_formula(name: str) -> None:
    found = loss(name, label_smoothing=SMOOTHING)
    assert found == pytest.approx([SMOOTHED_FORMULAS[name](i) for i in range(N)], rel=2e-5)


def test_sorted_losses_are_the_optimal_matching() -> None:
    margins = sorted(c - r for c, r in zip(CHOSEN, REJECTED, strict=True))
    references = sorted(c - r for c, r in zip(REF_CHOSEN, REF_REJECTED, strict=True))
    expected = [nll(BETA * (a - b)) for a, b in zip(margins, references, strict=True)]
    assert loss("aot") == pytest.approx(expected, rel=2e-5)
    chosen, rejected = (sorted(ratios(i)[side] for i in range(N)) for side in (0, 1))
    expected = [nll(BETA * (a - b)) for a, b in zip(chosen, rejected, strict=True)]
    assert loss("aot_unpaired") == pytest.approx(expected, rel=2e-5)


def test_every_loss_has_a_formula_here() -> None:
    assert {*FORMULAS, *SMOOTHED_FORMULAS, "aot", "aot_unpaired"} == set(LOSSES)


def test_every_loss_is_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
    missing = [name for name in LOSSES if f"\n| `{name}` |" not in text]
    assert not missing


DIVERGENCES: dict[str, Callable[[float], float]] = {
    "reverse_kl": math.log,
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_scores_with_its_derivative(name: str) -> None:
    slope = DIVERGENCES[name]
    expected = [nll(BETA * (slope(math.exp(ratios(i)[0])) - slope(math.exp(ratios(i)[1])))) for i in range(N)]
    assert loss("sigmoid", divergence=name, alpha=0.7) == pytest.approx(expected, rel=2e-5)


def test_the_alpha_divergence_goes_to_reverse_kl_at_one() -> None:
    near, limit = (loss("sigmoid", divergence="alpha_divergence", alpha=alpha) for alpha in (1 + 1e-4, 1.0))
    assert limit == loss("sigmoid")
    assert near == pytest.approx(limit, rel=1e-3)


def test_far_ratios_give_finite_scores() -> None:
    far = logps([-500.0] * N, [-900.0] * N)
    for name in DIVERGENCES:
        assert all(map(math.isfinite, loss("sigmoid", actor=far, divergence=name, alpha=0.2)))


def test_equal_models_cost_log_two_and_a_certain_margin_costs_nothing() -> None:
    assert loss("sigmoid", actor=REFERENCE) == pytest.approx([math.log(2.0)] * N)
    assert loss("hinge", actor=logps([0.0] * N, [-99.0] * N)) == [0.0] * N


# discopop is not monotonous: near a margin of 0 its gradient points the other way (Lu et al. 2024, figure 4).
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sft", "discopop"}))
def test_the_gradient_of_a_pair_prefers_chosen(name: str) -> None:
    """Of equal log-ratios: chosen rises against rejected, and the reference gets no gradient."""
    chosen, rejected = (torch.tensor([-3.0], requires_grad=True) for _ in range(2))
    actor = PairValues(chosen=chosen, rejected=rejected)
    reference = PairValues(chosen=torch.tensor([-3.0]), rejected=torch.tensor([-3.0]))
    inputs = LossInputs(
        actor=actor,
        reference=reference,
        chosen_lengths=torch.tensor([4.0]),
        rejected_lengths=torch.tensor([4.0]),
        mean_chosen_length=4.0,
        settings=LossSettings(beta=0.1, label_smoothing=1e-3),
    )
    grads = torch.autograd.grad(LOSSES[name](inputs).sum(), [chosen, rejected])
    assert grads[0].item() < grads[1].item()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - OF_WHOLE_BATCH))
def test_a_pairs_loss_does_not_depend_on_the_others(name: str) -> None:
    whole = loss(name, label_smoothing=SMOOTHING)
    assert [loss(name, rows=[i], label_smoothing=SMOOTHING)[0] for i in range(N)] == whole


@pytest.mark.parametrize("name", sorted(OF_WHOLE_BATCH))
def test_the_loss_of_a_whole_batch_depends_on_the_others_but_not_on_their_order(name: str) -> None:
    assert loss(name, rows=[1])[0] != pytest.approx(loss(name)[1], rel=1e-3)
    assert sum(loss(name, rows=[3, 1, 0, 2])) == pytest.approx(sum(loss(name)), rel=1e-6)


def test_ipo_divides_by_the_length_offline_only() -> None:
    expected = [
        (ratios(i)[0] / CHOSEN_LENGTHS[i] - ratios(i)[1] / REJECTED_LENGTHS[i] - 1 / (2 * BETA)) ** 2 for i in range(N)
    ]
    assert loss("ipo", offline=True) == pytest.approx(expected, rel=2e-5)
    assert loss("ipo", reduction="mean") == pytest.approx(expected, rel=2e-5)
    assert loss("ipo", offline=True, reduction="sum") == loss("ipo")
    assert loss("sigmoid", offline=True) == loss("sigmoid")


def test_pref_ftx_adds_the_mean_negative_log_likelihood_of_chosen() -> None:
    expected = [FORMULAS["sigmoid"](i) - 0.7 * averages(i)[0] for i in range(N)]
    assert loss("sigmoid", pref_ftx=0.7) == pytest.approx(expected, rel=2e-5)


def test_several_losses_are_a_weighted_sum() -> None:
    settings = LossSettings(beta=BETA, simpo_gamma=GAMMA, discopop_tau=TAU)
    both = WeightedLoss(names=("sigmoid", "sft"), weights=(1.0, 0.2), settings=settings)
    found = both(ACTOR, REFERENCE, LENGTHS, MEAN_LENGTH).tolist()
    assert found == pytest.approx([FORMULAS["sigmoid"](i) + 0.2 * FORMULAS["sft"](i) for i in range(N)], rel=2e-5)


def test_the_sft_term_is_the_mean_over_tokens() -> None:
    assert sum(loss("sft")) / N == pytest.approx(-sum(CHOSEN) / sum(CHOSEN_LENGTHS), rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_those_of_autograd(name: str) -> None:
    weighted = WeightedLoss(names=(name,), weights=(1.0,), settings=LossSettings(beta=BETA, label_smoothing=SMOOTHING))

    def losses(actor: PairValues) -> Tensor:
        return weighted(actor, REFERENCE, LENGTHS, MEAN_LENGTH)

    values, grads = gradients(losses, ACTOR)
    step = 1e-2
    for side in ("chosen", "rejected"):
        for i in range(N):
            moved = getattr(ACTOR, side).double().clone()
            ends = []
            for sign in (1, -1):
                other = moved.clone()
                other[i] += sign * step
                ends.append(losses(replace(_double(ACTOR), **{side: other})).sum())
            slope = float(ends[0] - ends[1]) / (2 * step)
            if name != "kto_pair":  # its means carry no gradient, by definition
                assert getattr(grads, side)[i].item() == pytest.approx(slope, rel=2e-2, abs=1e-4)
    assert values.tolist() == losses(ACTOR).tolist()
    assert not values.requires_grad


def _double(logps: PairValues) -> PairValues:
    return PairValues(chosen=logps.chosen.double(), rejected=logps.rejected.double())
