"""Training on preference pairs: the DPO family, online and offline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlxf.config.roles import LossConfig
from rlxf.core.types import Metrics, OnlinePairs, PairValues, ReferencedPairs, Sequences
from rlxf.models.backend import pair_logps, pair_wpo_weights, sum_sides, wpo_weights
from rlxf.models.batching import pair_groups
from rlxf.update.losses import LossSettings, WeightedLoss, gradients
from rlxf.update.objective import Loss, MicroBatch, MiniBatch, ObjectiveContext, moments, report
from rlxf.update.off_policy import SUMS, off_policy_metrics, off_policy_sums

if TYPE_CHECKING:
    from rlxf.models.megatron.packing import Packed

_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "objective/kl",
    "objective/entropy",
)


def make_loss(config: LossConfig, *, offline: bool) -> WeightedLoss:
    """The loss that a recipe describes, with the beta of its first epoch; ``offline``: the pairs come from a file."""
    return WeightedLoss(
        names=config.dpo_loss_type,
        weights=config.loss_weights,
        settings=LossSettings(
            beta=config.beta_after(0),
            label_smoothing=config.dpo_label_smoothing,
            divergence=config.f_divergence_type,
            alpha=config.f_alpha_divergence_coef,
            discopop_tau=config.discopop_tau,
            simpo_gamma=config.simpo_gamma,
        ),
        reduction=config.dpo_logp_reduction,
        offline=offline,
        pref_ftx=config.pref_ftx,
    )


class PreferenceObjective:
    """A loss of each pair, from the log-probabilities of its two sides under actor and reference."""

    sums: tuple[str, ...] = ("count", *_MEANS, "drift/sum", "drift/count", *SUMS)
    maxima: tuple[str, ...] = ("drift/max",)

    def __init__(self, config: LossConfig, context: ObjectiveContext, *, offline: bool, has_reference: bool) -> None:
        self._has_reference = has_reference
        self._loss = make_loss(config, offline=offline)
        self._ld_alpha, self._weighs = config.ld_alpha, config.dpo_weighting == "wpo"
        self._context = context

    @property
    def _beta(self) -> float:
        return self._loss.settings.beta

    def _take_beta(self, batch: ReferencedPairs) -> None:
        """From now on the loss has the beta of this batch's step."""
        if batch.beta is not None and batch.beta != self._beta:
            self._loss = replace(self._loss, settings=replace(self._loss.settings, beta=batch.beta))

    def mini_batch(self, batch: ReferencedPairs, rows: Tensor, *, first_pass: bool) -> MiniBatch:
        self._take_beta(batch)
        picked = batch.select(rows)
        sequences = Sequences.concat([picked.pairs.chosen, picked.pairs.rejected])
        mean_length = float(picked.pairs.chosen.completion_lengths.double().mean())
        known = self._whole(picked, mean_length) if self._loss.needs_whole_batch else None

        def micro_batch(groups: Tensor, counted: bool) -> MicroBatch:
            """The pairs ``groups`` of ``picked``. The actor calls it before the schedule starts."""
            part = picked.select(groups)
            pairs = part.pairs
            engine = pairs.all_engine_logps() if first_pass and isinstance(pairs, OnlinePairs) and counted else None
            losses = partial(self._losses, part, mean_length)
            if known is not None:
                losses = partial(_with_gradients, known[0][groups], known[1].select(groups))
            return self._micro_batch(part, losses, engine, counted)

        return MiniBatch(sequences=sequences, groups=pair_groups(len(rows)), micro_batch=micro_batch)

    def _micro_batch(
        self, part: ReferencedPairs, losses: partial[Tensor], engine: Tensor | None, counted: bool
    ) -> MicroBatch:
        from rlxf.models.megatron.packing import pack_for_logps

        context = self._context
        sequences = Sequences.concat([part.pairs.chosen, part.pairs.rejected])
        packed: Packed = pack_for_logps(
            sequences,
            context.model.layout,
            share_prompts=context.limits.share_prompts,
            num_tokens=context.limits.length,
        )

        def loss(hidden: Tensor) -> Loss:
            """Megatron's schedule calls it on the last stage, with the hidden states of this micro-batch."""
            token_logps = context.model.logps(hidden, packed)
            sides = sum_sides(token_logps, sequences.completion_lengths, self._ld_alpha).chunk(2)
            actor = PairValues(chosen=sides[0], rejected=sides[1])
            values = losses(actor)  # [n]
            if self._weighs:
                values = values * wpo_weights(context.model, hidden, packed, token_logps)
            log_ratios = None if engine is None else token_logps.detach().cpu().double() - engine
            difference = _difference(log_ratios)
            columns = [*self._columns(part, values, actor), difference, _ones(difference)]
            off_policy = off_policy_sums(log_ratios, sequences.completion_lengths)
            found = report(columns, [_largest(difference)], counted, off_policy)
            share = 1.0 if counted else 0.0
            return values.sum() * share, context.count(len(part), counted), found

        return MicroBatch(packed=packed, loss=loss)

    def _losses(self, part: ReferencedPairs, mean_length: float, actor: PairValues) -> Tensor:
        lengths = torch.cat([part.pairs.chosen.completion_lengths, part.pairs.rejected.completion_lengths])
        reference = part.reference.to(actor.chosen.device)
        return self._loss(actor, reference, lengths, mean_length)

    def _whole(self, picked: ReferencedPairs, mean_length: float) -> tuple[Tensor, PairValues]:
        """Losses and gradients over all pairs of the mini-batch, from a first pass of the model without gradient."""
        actor = pair_logps(self._context.model, picked.pairs, self._context.limits, ld_alpha=self._ld_alpha)
        return gradients(partial(self._losses, picked, mean_length), actor)

    def _columns(self, part: ReferencedPairs, losses: Tensor, actor: PairValues) -> list[Tensor]:
        """[n] each: 1, then the values that ``_MEANS`` names. Log-probs are summed, even if the loss averages them."""
        reference = part.reference.to(actor.chosen.device)
        chosen, rejected = actor.chosen - reference.chosen, actor.rejected - reference.rejected
        kl = (chosen + rejected) / 2
        if not self._has_reference:  # the implicit reward of reference-free losses is per token
            chosen = actor.chosen / part.pairs.chosen.completion_lengths.to(actor.chosen)
            rejected = actor.rejected / part.pairs.rejected.completion_lengths.to(actor.chosen)
        beta = self._beta
        return [
            torch.ones_like(losses),
            losses,
            beta * chosen,
            beta * rejected,
            beta * (chosen - rejected),
            (chosen > rejected).float(),
            actor.chosen,
            actor.rejected,
            kl,
            -(actor.chosen + actor.rejected) / 2,
        ]

    def metrics(self, sums: Tensor, maxima: Tensor) -> Metrics:
        found = dict(zip(self.sums, sums.tolist(), strict=True))
        off_policy = off_policy_metrics(sums[-len(SUMS) :])
        means = {name: found[name] / found["count"] for name in _MEANS}
        if not self._has_reference:
            del means["objective/kl"]
        drift: Metrics = {}
        if found["drift/count"]:
            drift["rollout/logp_diff_mean"] = found["drift/sum"] / found["drift/count"]
            drift["rollout/logp_diff_max"] = float(maxima[0])
        return {**means, **drift, **off_policy, "beta": self._beta}

    def evaluate(self, batch: ReferencedPairs) -> Metrics:
        self._take_beta(batch)
        model, limits = self._context.model, self._context.limits
        actor = pair_logps(model, batch.pairs, limits, ld_alpha=self._ld_alpha)
        mean_length = float(batch.pairs.chosen.completion_lengths.double().mean())
        losses = self._losses(batch, mean_length, actor)
        if self._weighs:
            losses = losses * pair_wpo_weights(model, batch.pairs, limits)
        nothing = torch.zeros(0)
        columns = [*self._columns(batch, losses, actor), nothing, nothing]
        found = report(columns, [], counted=True, totals=off_policy_sums(None, nothing))
        metrics = self.metrics(found, torch.zeros(1))
        del metrics["beta"]
        return metrics | moments(losses, torch.ones_like(losses))


def _with_gradients(losses: Tensor, grads: PairValues, actor: PairValues) -> Tensor:
    """[n] losses that have the given values, and with respect to ``actor`` the given gradients."""
    grads = grads.to(actor.chosen.device)
    linear = grads.chosen * actor.chosen + grads.rejected * actor.rejected
    return losses.to(linear) + linear - linear.detach()


def _difference(log_ratios: Tensor | None) -> Tensor:
    """[m] float64: |trainer - engine| of the tokens whose log-probs the engine gave."""
    if log_ratios is None:
        return torch.zeros(0, dtype=torch.float64)
    difference = log_ratios.abs()
    return difference[difference.isfinite()]


def _ones(values: Tensor) -> Tensor:
    return torch.ones_like(values)


def _largest(values: Tensor) -> Tensor:
    return values.max() if len(values) else torch.tensor(0.0, dtype=torch.float64)
