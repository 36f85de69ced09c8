"""What one optimizer step minimises: the part of training that differs between preferences, examples and rewards.

The actor asks its ``Objective`` for a ``MiniBatch`` per optimizer step, and the ``MiniBatch`` for each ``MicroBatch``
of this rank. docs/architecture.md shows the order of the calls.
"""

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

MOMENTS = "moments/"  # prefix of the metrics of an evaluation from which standard errors are computed
# The report on the CPU. It is asked for after all passes of an optimizer step, so that the host waits once.
Report = Callable[[], Tensor]
Loss = tuple[Tensor, Tensor, Report]  # summed loss, and number of items in the sum


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward and backward pass: its tokens, and the loss as a function of the last stage's hidden states."""

    packed: Packed
    loss: Callable[[Tensor], Loss]


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatch:
    """The rows of one optimizer step, the same on every rank."""

    sequences: Sequences
    # Rows of ``sequences`` that share a forward pass: the two sides of a pair, all of a prompt's pairs, or one example.
    groups: Sequence[Tensor]
    # Makes the micro-batch of some ``groups``, given by index. The second argument is False for a filler: a rank
    # without groups of its own computes one only to take part in the collective calls, and nothing of it counts.
    micro_batch: Callable[[Tensor, bool], MicroBatch]


B_contra = TypeVar("B_contra", contravariant=True)


class Objective(Protocol[B_contra]):
    """The loss and the metrics of a stage: with gradient, which the actor accumulates, and without, for evaluations."""

    sums: tuple[str, ...]  # names of a report's sums; the first is the number of items, the second the loss
    maxima: tuple[str, ...]  # names of its maxima, which follow the sums

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
    margin_weight: float  # how much of a pair's margin is subtracted from the loss' logit
    has_reference: bool  # preference pairs come with a reference's log-probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveContext:
    """The model that an objective computes with, and how much of it at a time."""

    model: MegatronModel
    limits: MicroBatchLimits

    def count(self, number: int, counted: bool) -> Tensor:
        """The number of items, by which gradients are divided. Only one of the context-parallel ranks counts them."""
        layout = self.model.layout
        counts = counted and layout.cp_rank == 0
        return torch.full((), number if counts else 0, dtype=torch.int, device=layout.device)  # no copy to wait for


def moments(losses: Tensor, counts: Tensor) -> Metrics:
    """Moments for the standard error of the mean loss, as means over the counts, so that batches can be pooled.

    Args:
        losses: [n] loss of each item, summed over what counts in it.
        counts: [n] weight of each item: 1 for a pair, the number of counted tokens for an example.
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
