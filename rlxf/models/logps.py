"""Log-probabilities of target tokens without a [rows, vocabulary] tensor. Pure torch; works on any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**23  # logits held at a time, fp32: 32 MiB


def target_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Log-softmax of ``hidden @ weight.T`` at each row's target.

    Logits exist for a few rows at a time, in fp32. The backward pass computes them again, so memory beyond the result
    and the gradients stays below a few times ``chunk_elements`` numbers whatever the vocabulary. With a vocabulary cut
    over a tensor-parallel group, maximum, sum and target logit are exchanged, and every rank's softmax gets its
    gradient, whether or not it holds the target.

    Args:
        hidden: [R, H], the same on every rank of ``group``.
        weight: [V / tp, H], this rank's rows of the head; rank ``i`` holds rows ``i * V / tp`` and on.
        targets: [R] int64 token ids.
        group: the tensor-parallel group; None for a whole vocabulary.
        chunk_elements: logits held at a time.

    Returns:
        [R] float32. The gradient of ``hidden`` is whole on every rank, that of ``weight`` belongs to its own rows.
    """
    result: Tensor = _TargetLogps.apply(hidden, weight, targets, group, chunk_elements)  # type: ignore[no-untyped-call]
    return result


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None, chunk_elements: int
    ) -> Tensor:
        local = _local_targets(targets, weight, group)
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty_like(result)  # log of the sum of exponentials of the whole vocabulary
        for rows in _chunks(len(targets), len(weight), chunk_elements):
            logits = (hidden[rows] @ weight.t()).float()  # [rows, V / tp]
            top = logits.amax(dim=1)
            _reduce(top, group, dist.ReduceOp.MAX)
            total = (logits - top[:, None]).exp_().sum(dim=1)
            _reduce(total, group, dist.ReduceOp.SUM)
            normalizer[rows] = total.log_().add_(top)
            here, column = local[rows] >= 0, local[rows].clamp_min(0)
            picked = logits.gather(1, column[:, None])[:, 0].masked_fill_(~here, 0.0)
            _reduce(picked, group, dist.ReduceOp.SUM)
            result[rows] = picked - normalizer[rows]
        ctx.save_for_backward(hidden, weight, local, normalizer)
        ctx.group, ctx.chunk_elements = group, chunk_elements
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, local, normalizer = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # bf16 rows are summed in fp32: thousands of small terms would vanish in a bf16 sum.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for rows in _chunks(len(local), len(weight), ctx.chunk_elements):
            grad = grads[0][rows, None]  # [rows, 1]
            slope = (
                (hidden[rows] @ weight.t()).float().sub_(normalizer[rows, None]).exp_().mul_(-grad)
            )  # [rows, V / tp]
            mine = (local[rows] >= 0).nonzero()[:, 0]
            slope[mine, local[rows][mine]] += grad[mine, 0]
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(slope.t(), hidden[rows])
                else:
                    grad_weight += slope.t() @ hidden[rows]
        if grad_hidden is not None:
            _reduce(grad_hidden, ctx.group, dist.ReduceOp.SUM)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(num_rows: int, vocabulary: int, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // vocabulary)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _local_targets(targets: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R] column of each target in this rank's rows of the head, -1 where another rank holds it."""
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    column = targets - first
    return torch.where((column >= 0) & (column < len(weight)), column, -1)


def _reduce(values: Tensor, group: dist.ProcessGroup | None, operation: Any) -> None:
    if group is not None:
        dist.all_reduce(values, op=operation, group=group)
