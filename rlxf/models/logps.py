"""Log-probabilities of target tokens without a [rows, vocabulary] tensor. Pure torch; works on any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.platform.linear import Linear

CHUNK_ELEMENTS = 2**21  # logits held at a time, fp32: 8 MiB, which stays in a CPU's cache
CHUNK_ROWS = 1024


def target_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    linear: Linear | None = None,
) -> Tensor:
    """Log-softmax of ``hidden @ weight.T`` at each row's target.

    Logits exist for a part of the rows and of the vocabulary at a time, and are summed in fp32. The backward pass
    computes them again, so memory beyond the result and the gradients stays below a few times ``chunk_elements``
    numbers (and one fp32 copy of ``hidden``) whatever the vocabulary. With a vocabulary cut over a tensor-parallel
    group, maximum, sum and target logit are exchanged once, and every rank's softmax gets its gradient, whether or not
    it holds the target.

    Args:
        hidden: [R, H], the same on every rank of ``group``.
        weight: [V / tp, H], this rank's rows of the head; rank ``i`` holds rows ``i * V / tp`` and on.
        targets: [R] int64 token ids.
        group: the tensor-parallel group; None for a whole vocabulary.
        vocab_size: ids from here on are padding rows of the head: no part of the sum, zero gradient. None: no padding.
        chunk_elements: logits held at a time.
        linear: computes the products; None for torch's own.

    Returns:
        [R] float32. The gradient of ``hidden`` is whole on every rank, that of ``weight`` belongs to its own rows.
    """
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    num_real = len(weight) if vocab_size is None else min(max(vocab_size - first, 0), len(weight))
    result: Tensor = _TargetLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets - first, num_real, group, chunk_elements, linear or Linear()
    )
    return result


@torch.no_grad()
def log_collisions(
    hidden: Tensor,
    weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    linear: Linear | None = None,
) -> Tensor:
    """Log of the probability that two tokens drawn from the softmax of ``hidden @ weight.T`` are the same one.

    That is the log of the sum of squared probabilities. Arguments and memory as for ``target_logps``; no gradient.

    Returns:
        [R] float32.
    """
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    num_real = len(weight) if vocab_size is None else min(max(vocab_size - first, 0), len(weight))
    linear = linear or Linear()
    top = torch.full((len(hidden),), -torch.inf, dtype=torch.float32, device=hidden.device)
    total, squares = torch.zeros_like(top), torch.zeros_like(top)
    for part in _vocabulary_chunks(num_real, len(hidden), chunk_elements):
        for rows in _row_chunks(len(hidden), chunk_elements):
            logits = linear.output(hidden[rows], weight[part]).float()  # [rows, part]
            highest = torch.maximum(top[rows], logits.amax(dim=1))
            shrink = (top[rows] - highest).exp_()
            exponentials = logits.sub_(highest[:, None]).exp_()
            total[rows] = total[rows] * shrink + exponentials.sum(dim=1)
            squares[rows] = squares[rows] * shrink.square() + exponentials.square_().sum(dim=1)
            top[rows] = highest
    return _log_of_sum(2 * top, squares, group) - 2 * _log_of_sum(top, total, group)


class _TargetLogps(torch.autograd.Function):
    """``columns``: each target's row of this rank's ``weight``; outside ``[0, num_real)``, another rank holds it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        columns: Tensor,
        num_real: int,
        group: dist.ProcessGroup | None,
        chunk_elements: int,
        linear: Linear,
    ) -> Tensor:
        top = torch.full(columns.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        for part in _vocabulary_chunks(num_real, len(columns), chunk_elements):
            for rows in _row_chunks(len(columns), chunk_elements):
                logits = linear.output(hidden[rows], weight[part]).float()  # [rows, part]
                here, column = _targets_in(columns[rows], part)
                picked[rows][here] = logits[here, column]
                highest = torch.maximum(top[rows], logits.amax(dim=1))
                # What was summed under a lower maximum shrinks to the new one (online softmax).
                total[rows] *= (top[rows] - highest).exp_()
                total[rows] += logits.sub_(highest[:, None]).exp_().sum(dim=1)
                top[rows] = highest
        normalizer = _log_of_sum(top, total, group)  # log of the sum of exponentials of the whole vocabulary
        _reduce(picked, group, dist.ReduceOp.SUM)
        ctx.save_for_backward(hidden, weight, columns, normalizer)
        ctx.num_real, ctx.group, ctx.chunk_elements, ctx.linear = num_real, group, chunk_elements, linear
        return picked - normalizer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden, weight, columns, normalizer = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            grad_weight[ctx.num_real :] = 0
        for part in _vocabulary_chunks(ctx.num_real, len(columns), ctx.chunk_elements):
            # bf16 parts are summed in fp32: thousands of small terms would vanish in a bf16 sum.
            grad_part: Tensor | None = None
            for rows in _row_chunks(len(columns), ctx.chunk_elements):
                logits = ctx.linear.output(hidden[rows], weight[part])
                slope = _slope(logits, normalizer[rows], grads[0][rows], _targets_in(columns[rows], part))
                if grad_hidden is not None:
                    grad_hidden[rows] += ctx.linear.grad_input(slope, weight[part])
                if wants_weight:
                    product = ctx.linear.grad_weight(slope, hidden[rows]).float()
                    grad_part = product if grad_part is None else grad_part.add_(product)
            if grad_weight is not None:  # a context-parallel rank may have no row at all
                grad_weight[part] = 0 if grad_part is None else grad_part
        if grad_hidden is not None:
            _reduce(grad_hidden, ctx.group, dist.ReduceOp.SUM)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _slope(logits: Tensor, normalizer: Tensor, grad: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """[rows, part] gradient of the logits, in their dtype: ``grad * (one-hot - softmax)``."""
    slope = logits.float().sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    here, column = targets
    slope[here, column] += grad[here]
    return slope.to(logits.dtype)


def _log_of_sum(top: Tensor, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R] logarithm of the group's sum of ``total * exp(top)``."""
    highest = top.clone()
    _reduce(highest, group, dist.ReduceOp.MAX)
    total.mul_((top - highest).exp_())
    _reduce(total, group, dist.ReduceOp.SUM)
    return total.log_().add_(highest)


def _targets_in(columns: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in this part of the vocabulary, and its column there."""
    here = ((columns >= part.start) & (columns < part.stop)).nonzero()[:, 0]
    return here, columns[here] - part.start


def _row_chunks(num_rows: int, chunk_elements: int) -> Iterator[slice]:
    return _slices(num_rows, min(CHUNK_ROWS, chunk_elements))


def _vocabulary_chunks(num_real: int, num_rows: int, chunk_elements: int) -> Iterator[slice]:
    rows = max(1, min(num_rows, CHUNK_ROWS, chunk_elements))
    return _slices(num_real, chunk_elements // rows)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _reduce(values: Tensor, group: dist.ProcessGroup | None, operation: Any) -> None:
    if group is not None:
        dist.all_reduce(values, op=operation, group=group)
