"""Training a reward model on pairs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.core.tensors import to_device
from rlxf.core.types import Metrics, RewardPairs, Sequences
from rlxf.models.backend import pair_scores
from rlxf.models.batching import pair_groups
from rlxf.update.objective import Loss, MicroBatch, MiniBatch, ObjectiveContext, moments, report

_MEANS = ("loss", "accuracy", "margin", "mean_reward")


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, *, centering: float = 0.0) -> Tensor:
    """[N] ``-log s(chosen - rejected - margin) + centering * (chosen + rejected)**2``.

    Bradley-Terry with the margin of Llama 2 (Touvron et al. 2023, eq. 2) and the centring of Eisenstein et al. (2023).

    Args:
        chosen: [N] scores. rejected: [N] scores.
        margin: [N] how much better chosen is, by the data; 0 for plain Bradley-Terry.
        centering: weight of the term that keeps the mean of scores near 0.
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + centering * (chosen + rejected).square() if centering else losses


class RewardObjective:
    """The Bradley-Terry loss of each pair's two scores, read at the last token of each side.

    The data ends a side with the token that ends its answer, so that is where a scorer has to read.
    """

    sums: tuple[str, ...] = ("count", *_MEANS)
    maxima: tuple[str, ...] = ("max_reward", "-min_reward")

    def __init__(self, centering: float, context: ObjectiveContext) -> None:
        self._centering = centering
        self._context = context

    def mini_batch(self, batch: RewardPairs, rows: Tensor, *, first_pass: bool) -> MiniBatch:
        picked = batch.select(rows)

        def micro_batch(groups: Tensor, counted: bool) -> MicroBatch:
            return self._micro_batch(picked.select(groups), counted)

        sequences = Sequences.concat([picked.chosen, picked.rejected])
        return MiniBatch(sequences=sequences, groups=pair_groups(len(rows)), micro_batch=micro_batch)

    def _micro_batch(self, part: RewardPairs, counted: bool) -> MicroBatch:
        from rlxf.models.megatron.packing import pack_for_scores

        context = self._context
        packed = pack_for_scores(
            Sequences.concat([part.chosen, part.rejected]),
            context.model.layout,
            share_prompts=context.limits.share_prompts,
            num_tokens=context.limits.length,
        )

        def loss(hidden: Tensor) -> Loss:
            chosen, rejected = context.model.scores(hidden, packed).chunk(2)
            losses = self._losses(part, chosen, rejected)
            found = partial(self._report, losses.detach(), chosen.detach(), rejected.detach(), counted)
            return losses.sum() * (1.0 if counted else 0.0), context.count(len(part), counted), found

        return MicroBatch(packed=packed, loss=loss)

    def _losses(self, part: RewardPairs, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = to_device(part.margin, chosen.device)
        return bradley_terry_loss(chosen, rejected, margin, centering=self._centering)

    def _report(self, losses: Tensor, chosen: Tensor, rejected: Tensor, counted: bool) -> Tensor:
        losses, chosen, rejected = torch.stack([losses, chosen, rejected]).cpu()
        means = [losses, (chosen > rejected).float(), chosen - rejected, (chosen + rejected) / 2]
        both = torch.cat([chosen, rejected])
        return report([torch.ones_like(losses), *means], [both, -both], counted)

    def metrics(self, sums: Tensor, maxima: Tensor) -> Metrics:
        count, *totals = sums.tolist()
        means = {name: total / count for name, total in zip(_MEANS, totals, strict=True)}
        return {**means, "max_reward": float(maxima[0]), "min_reward": -float(maxima[1])}

    def evaluate(self, batch: RewardPairs) -> Metrics:
        scores = pair_scores(self._context.model, batch, self._context.limits)
        losses = self._losses(batch, scores.chosen, scores.rejected)
        found = self._report(losses, scores.chosen, scores.rejected, counted=True)
        metrics = self.metrics(found[: len(self.sums)], found[len(self.sums) :])
        return metrics | moments(losses, torch.ones_like(losses))
