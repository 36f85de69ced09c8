"""Preference losses: pure functions of log-probabilities.

Each takes the log-probabilities of ``N`` pairs under the actor and under the frozen reference, and gives ``[N]``
float32 losses, not reduced: only the caller knows how many pairs all ranks hold. Gradients flow through ``actor`` only.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from rlxf.types import PairLogps


def log_ratio_difference(actor: PairLogps, reference: PairLogps) -> Tensor:
    """[N] how much more the actor prefers chosen over rejected than the reference does, in nats."""
    return (actor.chosen - actor.rejected) - (reference.chosen - reference.rejected)


def sigmoid_dpo_loss(actor: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Sigmoid DPO loss (Rafailov et al. 2023, eq. 7), with label smoothing as in cDPO (Mitchell 2023).

    Args:
        actor: log-probabilities under the model being trained.
        reference: the same under the frozen reference; carries no gradient.
        beta: pull towards the reference, > 0.
        label_smoothing: assumed share of pairs whose labels are swapped, in [0, 0.5).
    """
    logits = beta * log_ratio_difference(actor, reference)  # [N]
    if label_smoothing == 0.0:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def hinge_loss(actor: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Hinge loss on the implicit reward margin (SLiC, Zhao et al. 2023, as in RSO, Liu et al. 2024, eq. 10)."""
    return F.relu(1 - beta * log_ratio_difference(actor, reference))


def ipo_loss(actor: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """IPO loss (Azar et al. 2024, eq. 17): a squared distance to the margin 1 / (2 beta); beta is the paper's tau."""
    return (log_ratio_difference(actor, reference) - 1 / (2 * beta)).square()


class PairLoss(Protocol):
    """What every entry of ``LOSSES`` is."""

    def __call__(
        self, actor: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0
    ) -> Tensor: ...


LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid_dpo_loss, "hinge": hinge_loss, "ipo": ipo_loss}


def reduction_of(name: str, *, loss_type: str, offline: bool) -> str:
    """``sum`` or ``mean`` over the completion's tokens; ``auto`` is mean for offline IPO, else sum, as in TRL."""
    if name != "auto":
        return name
    return "mean" if loss_type == "ipo" and offline else "sum"
