"""Preference losses: pure functions of log-probabilities. The offline and the online stage call the same ones.

Each takes ``LossInputs`` of ``N`` pairs and returns ``[N]`` float32 losses, not reduced: only the caller knows how many
pairs all ranks hold. Gradients flow through ``actor`` only. Notation, as in docs/losses.md: ``beta`` is b, the
log-ratios of chosen and rejected are ``r_c`` and ``r_r``, their margin is ``d = r_c - r_r``, and ``s`` is the logistic
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.core.tensors import to_device
from rlxf.core.types import PairValues

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
_MAX_EXPONENT = 80.0  # e**80 is a float32; a ratio beyond it has a flat score instead of an infinite one


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """The numbers that losses read."""

    beta: float = 0.1  # KL strength, > 0
    label_smoothing: float = 0.0  # assumed share of pairs whose labels are swapped, in [0, 0.5)
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5  # of the alpha divergence
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What every loss reads of ``N`` pairs."""

    actor: PairValues  # summed over the completion, with gradient
    reference: PairValues  # the same under the reference; zeros if the loss needs none
    chosen_lengths: Tensor  # [N] float32 completion tokens
    rejected_lengths: Tensor  # [N] float32
    mean_chosen_length: float  # completion tokens of a chosen side, mean over the whole mini-batch
    settings: LossSettings
    average: bool = False  # scores are divided by the completion's length
    offset: Tensor | None = None  # [N] float32, subtracted from the logit of losses in ``WITH_OFFSET``

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """[N] log-ratios of actor and reference: of chosen, of rejected."""
        return self.actor.chosen - self.reference.chosen, self.actor.rejected - self.reference.rejected

    @property
    def averages(self) -> tuple[Tensor, Tensor]:
        """[N] the actor's log-probability per token: of chosen, of rejected."""
        return self.actor.chosen / self.chosen_lengths, self.actor.rejected / self.rejected_lengths

    @property
    def margin(self) -> Tensor:
        """[N] difference of the two scores: the f-divergence's derivative at each ratio (f-DPO, Wang et al. 2024)."""
        chosen, rejected = (_score(ratio, self.settings) for ratio in self.ratios)
        if self.average:
            return chosen / self.chosen_lengths - rejected / self.rejected_lengths
        return chosen - rejected

    def shifted(self, logits: Tensor) -> Tensor:
        """[N] logits minus the offset: chosen must be better by that much (ODPO, Amini et al. 2024)."""
        return logits if self.offset is None else logits - self.offset


def _score(ratio: Tensor, settings: LossSettings) -> Tensor:
    """``f'(t)`` at the ratio ``t = exp(ratio)``; the log-ratio itself for the reverse KL, which is plain DPO."""
    if settings.divergence == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=_MAX_EXPONENT))
    if settings.divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(ratio)
    power = settings.alpha - 1.0
    if settings.divergence == "reverse_kl" or abs(power) < 1e-6:  # the limit of the alpha divergence at 1
        return ratio
    return torch.expm1((power * ratio).clamp(max=_MAX_EXPONENT)) / power


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the preference's logit against a label that is right with ``1 - smoothing``."""
    if smoothing == 0.0:
        return -F.logsigmoid(logits)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def sigmoid_loss(inputs: LossInputs) -> Tensor:
    """``-log s(b d)`` (DPO, Rafailov et al. 2023, eq. 7), with label smoothing as in cDPO (Mitchell 2023)."""
    return _smoothed(inputs.shifted(inputs.settings.beta * inputs.margin), inputs.settings.label_smoothing)


def sigmoid_norm_loss(inputs: LossInputs) -> Tensor:
    """The sigmoid loss of scores per token (length-normalised DPO, Lambert et al. 2024, Tulu 3)."""
    return -F.logsigmoid(inputs.shifted(inputs.settings.beta * replace(inputs, average=True).margin))


def hinge_loss(inputs: LossInputs) -> Tensor:
    """``max(0, 1 - b d)`` (SLiC, Zhao et al. 2023, as in RSO, Liu et al. 2024, eq. 10)."""
    return F.relu(1 - inputs.shifted(inputs.settings.beta * inputs.margin))


def ipo_loss(inputs: LossInputs) -> Tensor:
    """``(d - 1 / (2 b))**2`` (IPO, Azar et al. 2024, eq. 17); b is the paper's tau."""
    return (inputs.margin - 1 / (2 * inputs.settings.beta)).square()


def robust_loss(inputs: LossInputs) -> Tensor:
    """The sigmoid loss without the bias of swapped labels (robust DPO, Chowdhury et al. 2024, eq. 3)."""
    logits, rate = inputs.shifted(inputs.settings.beta * inputs.margin), inputs.settings.label_smoothing
    return (-(1 - rate) * F.logsigmoid(logits) + rate * F.logsigmoid(-logits)) / (1 - 2 * rate)


def exo_pair_loss(inputs: LossInputs) -> Tensor:
    """KL from the policy's preference to the smoothed label (EXO, Ji et al. 2024, eq. 16); needs smoothing > 0."""
    logits, rate = inputs.settings.beta * inputs.margin, inputs.settings.label_smoothing
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-rate))
    return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(rate))


def nca_pair_loss(inputs: LossInputs) -> Tensor:
    """``-log s(b r_c) - log s(-b r_c) / 2 - log s(-b r_r) / 2`` (NCA, Chen et al. 2024)."""
    chosen, rejected = (inputs.settings.beta * ratio for ratio in inputs.ratios)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(inputs: LossInputs) -> Tensor:
    """``-log s(b r_c) - log s(-b r_r)``: a binary classifier's loss (BCO, Jung et al. 2024), without reward shift."""
    chosen, rejected = (inputs.settings.beta * ratio for ratio in inputs.ratios)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard_loss(inputs: LossInputs) -> Tensor:
    """``(r_c - 1 / (2 b))**2 + (r_r + 1 / (2 b))**2`` (SPPO, Wu et al. 2024, eq. 4.7 with hard preferences)."""
    chosen, rejected = inputs.ratios
    target = 0.5 / inputs.settings.beta
    return (chosen - target).square() + (rejected + target).square()


def apo_zero_loss(inputs: LossInputs) -> Tensor:
    """``1 - s(b r_c) + s(b r_r)``: chosen up, rejected down (APO-zero, D'Oosterlinck et al. 2024, eq. 7)."""
    chosen, rejected = inputs.ratios
    return torch.sigmoid(-inputs.settings.beta * chosen) + torch.sigmoid(inputs.settings.beta * rejected)


def apo_down_loss(inputs: LossInputs) -> Tensor:
    """``s(b r_c) + 1 - s(b (r_c - r_r))``: both down, rejected more (APO-down, D'Oosterlinck et al. 2024, eq. 8)."""
    chosen, rejected = inputs.ratios
    return torch.sigmoid(inputs.settings.beta * chosen) + torch.sigmoid(-inputs.settings.beta * (chosen - rejected))


def discopop_loss(inputs: LossInputs) -> Tensor:
    """A blend of logistic and exponential loss by the margin itself (DiscoPOP, Lu et al. 2024, eq. 5)."""
    logits = inputs.settings.beta * inputs.margin
    share = torch.sigmoid(logits / inputs.settings.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def aot_loss(inputs: LossInputs) -> Tensor:
    """The sigmoid loss between the sorted margins of actor and reference (AOT paired, Melnyk et al. 2024)."""
    margins = (inputs.actor.chosen - inputs.actor.rejected).sort().values
    return _smoothed(
        inputs.settings.beta * (margins - (inputs.reference.chosen - inputs.reference.rejected).sort().values),
        inputs.settings.label_smoothing,
    )


def aot_unpaired_loss(inputs: LossInputs) -> Tensor:
    """The sigmoid loss between the sorted log-ratios of all chosen and all rejected (AOT unpaired)."""
    chosen, rejected = inputs.ratios
    margins = chosen.sort().values - rejected.sort().values
    return _smoothed(inputs.settings.beta * margins, inputs.settings.label_smoothing)


def kto_pair_loss(inputs: LossInputs) -> Tensor:
    """Each side against the other side's mean log-ratio (KTO, Ethayarajh et al. 2024, eq. 8, both weights 1).

    The mean stands for the paper's ``z_0``: at least 0, and without gradient. The loss is the mean of both sides.
    """
    beta = inputs.settings.beta
    chosen, rejected = inputs.ratios
    chosen_kl, rejected_kl = (ratio.detach().mean().clamp(min=0) for ratio in (chosen, rejected))
    desirable = torch.sigmoid(-beta * (chosen - rejected_kl))
    undesirable = torch.sigmoid(-beta * (chosen_kl - rejected))
    return (desirable + undesirable) / 2


def simpo_loss(inputs: LossInputs) -> Tensor:
    """``-log s(b (a_c - a_r) - gamma)`` of log-probabilities per token (SimPO, Meng et al. 2024, eq. 6)."""
    chosen, rejected = inputs.averages
    settings = inputs.settings
    logits = inputs.shifted(settings.beta * (chosen - rejected) - settings.simpo_gamma)
    return _smoothed(logits, settings.label_smoothing)


def orpo_loss(inputs: LossInputs) -> Tensor:
    """``-a_c - b log s(log odds_c - log odds_r)`` per token (ORPO, Hong et al. 2024, eq. 6 and 7); b is lambda."""
    chosen, rejected = inputs.averages
    return -chosen - inputs.settings.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(average: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of the probability per token; p is kept off 1, where the odds are infinite."""
    return average - torch.log(-torch.expm1(average.clamp(max=-1e-6)))


def sft_loss(inputs: LossInputs) -> Tensor:
    """Negative log-likelihood of the chosen side; its mean over the mini-batch is the mean over chosen tokens."""
    return -inputs.actor.chosen / inputs.mean_chosen_length


PairLoss = Callable[[LossInputs], Tensor]

LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "kto_pair": kto_pair_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "sft": sft_loss,
}
# Losses of a pair that depend on the other pairs of its mini-batch: no micro-batch can be computed alone.
OF_WHOLE_BATCH = frozenset({"aot", "aot_unpaired", "kto_pair"})
# Losses of a logit from which a pair's margin can be subtracted. rlxf/config/pairs.py refuses it for the others.
WITH_OFFSET = frozenset({"sigmoid", "hinge", "robust", "sigmoid_norm", "simpo"})
# Losses that define themselves how the length enters, or for which a score per token has no meaning.
_OWN_REDUCTION = frozenset({"sigmoid_norm", "simpo", "orpo", "sft", "aot", "aot_unpaired", "kto_pair"})


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedLoss:
    """A weighted sum of losses, plus ``pref_ftx`` times the mean negative log-likelihood of each chosen token."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    settings: LossSettings
    reduction: Literal["auto", "sum", "mean"] = "auto"  # of scores over a completion's tokens
    offline: bool = False  # auto: IPO divides by the length offline and does not online, as in TRL
    pref_ftx: float = 0.0
    margin_weight: float = 0.0  # of a pair's score margin in the offset of losses in ``WITH_OFFSET``

    @property
    def needs_whole_batch(self) -> bool:
        return not OF_WHOLE_BATCH.isdisjoint(self.names)

    def __call__(
        self,
        actor: PairValues,
        reference: PairValues,
        lengths: Tensor,
        mean_chosen_length: float,
        margin: Tensor | None = None,
    ) -> Tensor:
        """[N] float32 losses; ``lengths`` [2N]: completion tokens, chosen then rejected.

        Args:
            actor: log-probabilities under the model being trained, summed over the completion.
            reference: the same under the reference.
            lengths: completion tokens.
            mean_chosen_length: mean over the chosen sides of the whole mini-batch, by the weights of the pairs.
            margin: [N] how much better chosen is by its score; None where nothing says so.
        """
        device, dtype = actor.chosen.device, actor.chosen.dtype
        chosen, rejected = to_device(lengths.to(dtype), device).chunk(2)
        offset = None
        if self.margin_weight and margin is not None:
            offset = self.margin_weight * to_device(margin.to(dtype), device)
        inputs = LossInputs(
            actor=actor,
            reference=reference,
            chosen_lengths=chosen,
            rejected_lengths=rejected,
            mean_chosen_length=mean_chosen_length,
            settings=self.settings,
            offset=offset,
        )
        total = torch.zeros_like(actor.chosen)
        for name, weight in zip(self.names, self.weights, strict=True):
            total = total + weight * LOSSES[name](replace(inputs, average=self._averages(name)))
        if self.pref_ftx:
            total = total - self.pref_ftx * inputs.averages[0]
        return total

    def _averages(self, name: str) -> bool:
        if self.reduction != "auto":
            return self.reduction == "mean" and name not in _OWN_REDUCTION
        return name == "ipo" and self.offline


def gradients(loss: Callable[[PairValues], Tensor], actor: PairValues) -> tuple[Tensor, PairValues]:
    """[N] losses, and the gradient of their sum with respect to each log-probability.

    For losses over a whole mini-batch: ``sum(gradient * logps)`` over a micro-batch has the gradient that the whole
    mini-batch's loss has with respect to that micro-batch.
    """
    with torch.enable_grad():
        leaf = PairValues(
            chosen=actor.chosen.detach().requires_grad_(), rejected=actor.rejected.detach().requires_grad_()
        )
        losses = loss(leaf)
        grads: Sequence[Tensor] = torch.autograd.grad(
            losses.sum(), [leaf.chosen, leaf.rejected], materialize_grads=True
        )
    return losses.detach(), PairValues(chosen=grads[0], rejected=grads[1])
