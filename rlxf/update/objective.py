"""What one optimizer step minimises: the part of training that differs between preferences, examples and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from rlxf.config.roles import LossConfig
from rlxf.core.types import Metrics, Sequences
from rlxf.models.batching import MicroBatchLimits

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel
    from rlxf.models.megatron.packing import Packed

MOMENTS = "moments/"  # begins the names of what a standard error is made of, among an evaluation's metrics
Loss = tuple[Tensor, Tensor, Tensor]  # sum, number of items that it is a sum of, and the report on the CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward/backward: its tokens, and what becomes of the last stage's hidden states."""

    packed: Packed
    loss: Callable[[Tensor], Loss]


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatch:
    """The rows of one optimizer step, the same on every rank."""

    sequences: Sequences
    groups: Sequence[Tensor]  # rows of ``sequences`` that share a forward pass: the two sides of a pair, or one example
    # Units of one forward pass, and whether they count: False on a rank that has none of its own, and computes one only
    # to take part in the collective calls.
    micro_batch: Callable[[Tensor, bool], MicroBatch]


B_contra = TypeVar("B_contra", contravariant=True)


class Objective(Protocol[B_contra]):
    """Sums and maxima over a mini-batch, whose gradient the actor accumulates; and the same without gradient."""

    sums: tuple[str, ...]  # of a report; the first is the number of items
    maxima: tuple[str, ...]  # behind them

    def mini_batch(self, batch: B_contra, rows: Tensor, *, first_pass: bool) -> MiniBatch:
        """``rows`` ([n] int64) of a batch. ``first_pass``: the weights are those that the batch was sampled from.

        Every rank must make the call.
        """
        ...

    def metrics(self, sums: Tensor, maxima: Tensor) -> Metrics:
        """Means by the names of docs/metrics.md, from the sums of all ranks and optimizer steps (float64)."""
        ...

    def evaluate(self, batch: B_contra) -> Metrics:
        """The same numbers without training, and ``moments``. Every rank must make the call, and has the result."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """What an objective must know of its run; each takes what it needs."""

    config: LossConfig
    offline: bool  # what is trained on comes from a file
    has_reference: bool  # preference pairs come with a reference's log-probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveContext:
    """The model that an objective computes with, and how much of it at a time."""

    model: MegatronModel
    limits: MicroBatchLimits

    def count(self, number: int, counted: bool) -> Tensor:
        """What the schedule divides by: every context-parallel rank has all losses, and one of them counts them."""
        layout = self.model.layout
        counts = counted and layout.cp_rank == 0
        return torch.tensor(number if counts else 0, dtype=torch.int, device=layout.device)


def moments(losses: Tensor, counts: Tensor) -> Metrics:
    """What the standard error of the mean loss is made of; as means over the counts, so that batches can be pooled.

    Args:
        losses: [n] loss of each item, summed over what counts in it.
        counts: [n] how much that is: 1 of a pair, the counted tokens of an example.
    """
    losses, counts = losses.double(), counts.double()
    total = counts.sum()
    found = {
        "items": torch.tensor(float(len(losses))),
        "squares": losses.square().sum(),
        "products": (losses * counts).sum(),
        "counts": counts.square().sum(),
    }
    return {f"{MOMENTS}{name}": float(value / total) for name, value in found.items()}


def report(sums: Sequence[Tensor], maxima: Sequence[Tensor], counted: bool, totals: Tensor | None = None) -> Tensor:
    """[len(sums) + len(totals) + len(maxima)] float64 on the CPU. A filler adds 0 and is no maximum.

    ``sums`` are [n] or scalars; ``totals`` are more sums, [k] float64 on the CPU, added up already.
    """
    more = torch.zeros(0, dtype=torch.float64) if totals is None else totals
    found = [value.detach().double().sum().cpu() for value in sums]
    largest = [value.detach().double().amax().cpu() for value in maxima]
    if not counted:
        return torch.tensor([0.0] * (len(found) + len(more)) + [-torch.inf] * len(largest), dtype=torch.float64)
    return torch.cat([torch.stack(found), more, *(value[None] for value in largest)])
