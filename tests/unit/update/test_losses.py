"""The losses against their formulas on paper."""

from __future__ import annotations

import math

import pytest
import torch

from rlxf.types import PairLogps
from rlxf.update.losses import LOSSES, hinge_loss, ipo_loss, reduction_of, sigmoid_dpo_loss


def pair(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(chosen=torch.tensor([chosen]), rejected=torch.tensor([rejected]))


REFERENCE = pair(-3.0, -5.0)  # prefers chosen by 2 nats


def test_equal_models_cost_log_two() -> None:
    assert sigmoid_dpo_loss(REFERENCE, REFERENCE, beta=0.1).item() == pytest.approx(math.log(2))


def test_equal_models_cost_one_in_hinge_and_a_quarter_of_inverse_beta_square_in_ipo() -> None:
    assert hinge_loss(REFERENCE, REFERENCE, beta=0.1).item() == pytest.approx(1.0)
    assert ipo_loss(REFERENCE, REFERENCE, beta=0.1).item() == pytest.approx(1 / (4 * 0.1**2))


def test_known_margin() -> None:
    actor = pair(-2.0, -8.0)  # prefers chosen by 6, the reference by 2: h = 4
    assert sigmoid_dpo_loss(actor, REFERENCE, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-2.0)), rel=1e-6)
    assert hinge_loss(actor, REFERENCE, beta=0.2).item() == pytest.approx(0.2, rel=1e-5)
    assert hinge_loss(actor, REFERENCE, beta=0.5).item() == 0.0
    assert ipo_loss(actor, REFERENCE, beta=0.1).item() == pytest.approx(1.0, rel=1e-5)  # (4 - 5)^2


def test_label_smoothing_mixes_the_two_label_orders() -> None:
    actor = pair(-2.0, -8.0)
    right = math.log(1 + math.exp(-2.0))
    swapped = math.log(1 + math.exp(2.0))
    value = sigmoid_dpo_loss(actor, REFERENCE, beta=0.5, label_smoothing=0.1).item()
    assert value == pytest.approx(0.9 * right + 0.1 * swapped, rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_raises_chosen_and_lowers_rejected_and_leaves_the_reference(name: str) -> None:
    actor = PairLogps(
        chosen=torch.tensor([-3.0], requires_grad=True), rejected=torch.tensor([-5.0], requires_grad=True)
    )
    reference = PairLogps(chosen=torch.tensor([-3.0], requires_grad=True), rejected=torch.tensor([-5.0]))
    LOSSES[name](
        actor, PairLogps(chosen=reference.chosen.detach(), rejected=reference.rejected), beta=0.1
    ).sum().backward()
    assert actor.chosen.grad is not None
    assert actor.rejected.grad is not None
    assert actor.chosen.grad.item() < 0 < actor.rejected.grad.item()
    assert reference.chosen.grad is None


def test_auto_reduction_is_mean_only_for_offline_ipo() -> None:
    for loss in LOSSES:
        for offline in (True, False):
            expected = "mean" if loss == "ipo" and offline else "sum"
            assert reduction_of("auto", loss_type=loss, offline=offline) == expected
    assert reduction_of("mean", loss_type="sigmoid", offline=False) == "mean"
