"""Training on preference pairs: the DPO family, online and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlxf.config.roles import LossConfig
from rlxf.core.errors import ShapeError
from rlxf.core.tensors import to_device
from rlxf.core.types import Metrics, OnlinePairs, Pairs, PairValues, ReferencedPairs
from rlxf.models.backend import log_alignment, pair_logps, pair_wpo_weights, side_sums, wpo_weights
from rlxf.models.sharing import Completions, completions_of, pair_units
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


def make_loss(config: LossConfig, *, offline: bool, margin_weight: float = 0.0) -> WeightedLoss:
    """The loss that a recipe describes, with the beta of its first epoch.

    Args:
        config: its keys.
        offline: the pairs come from a file.
        margin_weight: how much of a pair's margin is subtracted from the loss' logit.
    """
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
        margin_weight=margin_weight,
    )


class PreferenceObjective:
    """A loss of each pair, from the log-probabilities of its two sides under actor and reference.

    The loss of a mini-batch, and every mean that is reported, is one by the pairs' weights. A completion that is in
    several pairs of a forward pass is computed once there.
    """

    sums: tuple[str, ...] = ("count", *_MEANS, "drift/sum", "drift/count", *SUMS)
    maxima: tuple[str, ...] = ("drift/max", "beta")  # every micro-batch of a step has the same beta

    def __init__(
        self,
        config: LossConfig,
        context: ObjectiveContext,
        *,
        offline: bool,
        has_reference: bool,
        margin_weight: float = 0.0,
    ) -> None:
        self._has_reference = has_reference
        self._loss = make_loss(config, offline=offline, margin_weight=margin_weight)
        self._ld_alpha, self._weighs = config.ld_alpha, config.dpo_weighting == "wpo"
        self._context = context

    def _loss_of(self, batch: ReferencedPairs) -> WeightedLoss:
        """The loss with the beta of this batch's step; of a batch without one, the beta of the first epoch."""
        if batch.beta is None:
            return self._loss
        return replace(self._loss, settings=replace(self._loss.settings, beta=batch.beta))

    def mini_batch(self, batch: ReferencedPairs, rows: Tensor, *, first_pass: bool) -> MiniBatch:
        picked = batch.select(rows)
        mean_length = _mean_length(picked.pairs)
        known = self._whole(picked, mean_length) if self._loss.needs_whole_batch else None
        completions = completions_of(picked.pairs)
        units = pair_units(picked.pairs, completions, self._context.limits)
        # The gradients of all ranks are divided by the number of pairs; the sum of their weights is meant.
        scale = len(picked) / float(_weights(picked.pairs).sum())

        def micro_batch(groups: Tensor, counted: bool) -> MicroBatch:
            """The pairs of the units ``groups``. The actor calls it before the schedule starts."""
            index = torch.cat([units[group].pairs for group in groups.tolist()])
            part = picked.select(index)
            losses = partial(self._losses, part, mean_length)
            if known is not None:
                losses = partial(_with_gradients, known[0][index], known[1].select(index))
            return self._micro_batch(part, losses, scale, first_pass=first_pass, counted=counted)

        return MiniBatch(sequences=completions.sequences, groups=[unit.rows for unit in units], micro_batch=micro_batch)

    def _micro_batch(
        self, part: ReferencedPairs, losses: partial[Tensor], scale: float, *, first_pass: bool, counted: bool
    ) -> MicroBatch:
        from rlxf.models.megatron.packing import pack_for_logps

        context, pairs = self._context, part.pairs
        completions = completions_of(pairs)
        sequences, weights = completions.sequences, _weights(pairs)
        engine = None
        if first_pass and isinstance(pairs, OnlinePairs) and counted:
            engine = completions.of_each(pairs.all_engine_logps(), _lengths(pairs))
        packed: Packed = pack_for_logps(
            sequences,
            context.model.layout,
            share_prompts=context.limits.share_prompts,
            num_tokens=context.limits.length,
        )

        def loss(hidden: Tensor) -> Loss:
            """Megatron's schedule calls it on the last stage, with the hidden states of this micro-batch."""
            token_logps = context.model.logps(hidden, packed)
            actor = side_sums(completions, token_logps, self._ld_alpha)
            values = losses(actor)  # [n]
            if self._weighs:
                alignment = log_alignment(context.model, hidden, packed, token_logps)
                values = values * wpo_weights(completions.of_pairs(alignment))
            seen = [tensor.detach() for tensor in (values, actor.chosen, actor.rejected, token_logps)]
            share = torch.zeros_like(values)
            if counted:
                share = to_device((scale * weights).to(values.dtype), values.device)
            found = partial(self._report, part, completions, seen, engine, counted)
            return (share * values).sum(), context.count(len(part), counted), found

        return MicroBatch(packed=packed, loss=loss)

    def _report(
        self,
        part: ReferencedPairs,
        completions: Completions,
        seen: Sequence[Tensor],
        engine: Tensor | None,
        counted: bool,
    ) -> Tensor:
        """Of a micro-batch.

        Args:
            part: its pairs.
            completions: of them.
            seen: losses ([n]), log-probs of the chosen and of the rejected sides ([n]), and those of all tokens.
            engine: [tokens] float32 log-probs of the sampling engine; None: unknown, or not those of these weights.
            counted: False for a filler.
        """
        whole = torch.cat(list(seen)).cpu()
        losses, chosen, rejected, logps = torch.split(whole, [len(values) for values in seen])
        lengths = completions.sequences.completion_lengths
        counts = completions.weights(_weights(part.pairs))  # a completion counts as much as its pairs
        log_ratios = None if engine is None else logps.double() - engine
        difference, times = _difference(log_ratios, counts.repeat_interleave(lengths))
        columns = self._columns(part, losses, PairValues(chosen=chosen, rejected=rejected))
        off_policy = off_policy_sums(log_ratios, lengths, counts)
        maxima = [_largest(difference), self._beta(part)]
        return report([*columns, times * difference, times], maxima, counted, off_policy)

    def _losses(self, part: ReferencedPairs, mean_length: float, actor: PairValues) -> Tensor:
        reference = part.reference.to(actor.chosen.device)
        margin = part.pairs.margin if isinstance(part.pairs, OnlinePairs) else None
        return self._loss_of(part)(actor, reference, _lengths(part.pairs), mean_length, margin)

    def _beta(self, part: ReferencedPairs) -> Tensor:
        """Float64: of the loss."""
        return torch.tensor(self._loss_of(part).settings.beta, dtype=torch.float64)

    def _whole(self, picked: ReferencedPairs, mean_length: float) -> tuple[Tensor, PairValues]:
        """Losses and gradients over all pairs of the mini-batch, from a first pass of the model without gradient."""
        if len(set(_weights(picked.pairs).tolist())) > 1:
            raise ShapeError("a loss of all pairs at once is not defined for pairs of different weights")
        actor = pair_logps(self._context.model, picked.pairs, self._context.limits, ld_alpha=self._ld_alpha)
        return gradients(partial(self._losses, picked, mean_length), actor)

    def _columns(self, part: ReferencedPairs, losses: Tensor, actor: PairValues) -> list[Tensor]:
        """[n] float64 each: the pairs' weights, then the values that ``_MEANS`` names, times the weights.

        Log-probs are summed, even if the loss averages them.
        """
        reference = part.reference.to(actor.chosen.device)
        chosen, rejected = actor.chosen - reference.chosen, actor.rejected - reference.rejected
        kl = (chosen + rejected) / 2
        if not self._has_reference:  # the implicit reward of reference-free losses is per token
            chosen = actor.chosen / part.pairs.chosen.completion_lengths.to(actor.chosen)
            rejected = actor.rejected / part.pairs.rejected.completion_lengths.to(actor.chosen)
        beta = self._loss_of(part).settings.beta
        weights = _weights(part.pairs).to(losses.device).double()
        values = [
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
        return [weights, *(weights * value.detach().double() for value in values)]

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
        return {**means, **drift, **off_policy, "beta": float(maxima[1])}

    def evaluate(self, batch: ReferencedPairs) -> Metrics:
        model, limits = self._context.model, self._context.limits
        actor = pair_logps(model, batch.pairs, limits, ld_alpha=self._ld_alpha)
        losses, weights = self._losses(batch, _mean_length(batch.pairs), actor), _weights(batch.pairs)
        if self._weighs:
            losses = losses * pair_wpo_weights(model, batch.pairs, limits)
        nothing = torch.zeros(0)
        columns = [*self._columns(batch, losses, actor), nothing, nothing]
        found = report(columns, [], counted=True, totals=off_policy_sums(None, nothing))
        metrics = self.metrics(found, torch.zeros(len(self.maxima)))
        del metrics["beta"]
        return metrics | moments(weights * losses, weights)


def _weights(pairs: Pairs) -> Tensor:
    """[N] float32 weight of each pair in the loss and in the metrics: 1 of a pair from a file."""
    return pairs.weight if isinstance(pairs, OnlinePairs) else torch.ones(len(pairs))


def _mean_length(pairs: Pairs) -> float:
    """Completion tokens of a chosen side, mean by the pairs' weights."""
    weights = _weights(pairs).double()
    return float((weights * pairs.chosen.completion_lengths).sum() / weights.sum())


def _lengths(pairs: Pairs) -> Tensor:
    """[2N] int64 completion tokens: the chosen sides, then the rejected."""
    return torch.cat([pairs.chosen.completion_lengths, pairs.rejected.completion_lengths])


def _with_gradients(losses: Tensor, grads: PairValues, actor: PairValues) -> Tensor:
    """[n] losses that have the given values, and with respect to ``actor`` the given gradients."""
    grads = grads.to(actor.chosen.device)
    linear = grads.chosen * actor.chosen + grads.rejected * actor.rejected
    return losses.to(linear) + linear - linear.detach()


def _difference(log_ratios: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[m] float64 each: |trainer - engine| of the tokens whose log-probs the engine gave, and how much each counts."""
    if log_ratios is None:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    difference = log_ratios.abs()
    known = difference.isfinite()
    return difference[known], counts[known]


def _largest(values: Tensor) -> Tensor:
    return values.max() if len(values) else torch.tensor(0.0, dtype=torch.float64)
