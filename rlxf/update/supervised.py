"""Supervised fine-tuning: cross-entropy of the assistant's tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlxf.core.tensors import to_device
from rlxf.core.types import Examples, Metrics
from rlxf.models.backend import sum_rows, token_logps
from rlxf.update.objective import Loss, MicroBatch, MiniBatch, ObjectiveContext, moments, report


class SupervisedObjective:
    """The negative log-likelihood of each counted token, averaged over all counted tokens of the mini-batch."""

    sums: tuple[str, ...] = ("count", "loss")
    maxima: tuple[str, ...] = ()

    def __init__(self, context: ObjectiveContext) -> None:
        self._context = context

    def mini_batch(self, batch: Examples, rows: Tensor, *, first_pass: bool) -> MiniBatch:
        picked = batch.select(rows)

        def micro_batch(groups: Tensor, counted: bool) -> MicroBatch:
            return self._micro_batch(picked.select(groups), counted)

        groups = [torch.tensor([row]) for row in range(len(picked))]
        return MiniBatch(sequences=picked.sequences, groups=groups, micro_batch=micro_batch)

    def _micro_batch(self, part: Examples, counted: bool) -> MicroBatch:
        from rlxf.models.megatron.packing import pack_for_logps

        context, places = self._context, part.counted.nonzero()[:, 0]
        packed = pack_for_logps(
            part.sequences,
            context.model.layout,
            share_prompts=context.limits.share_prompts,
            num_tokens=context.limits.length,
        )

        def loss(hidden: Tensor) -> Loss:
            logps = context.model.logps(hidden, packed)  # [completion tokens]
            losses = -logps.index_select(0, to_device(places, logps.device))
            total = losses.sum() * (1.0 if counted else 0.0)
            found = partial(_report, losses.detach(), counted)
            return total, context.count(int(part.counted.sum()), counted), found

        return MicroBatch(packed=packed, loss=loss)

    def metrics(self, sums: Tensor, maxima: Tensor) -> Metrics:
        count, loss = sums.tolist()
        return {"loss": loss / count}

    def evaluate(self, batch: Examples) -> Metrics:
        logps = token_logps(self._context.model, batch.sequences, self._context.limits).double()
        losses = sum_rows(-logps * batch.counted, batch.sequences.completion_lengths)  # [N] of whole examples
        return {"loss": -float(logps[batch.counted].mean()), **moments(losses, batch.num_counted)}


def _report(losses: Tensor, counted: bool) -> Tensor:
    losses = losses.cpu()
    return report([torch.ones_like(losses), losses], [], counted)
