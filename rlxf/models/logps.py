"""Log-probabilities of target tokens without a [rows, vocabulary] tensor. Pure torch; works on any device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.platform.base import LogitChunks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.linear import Linear


def target_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunks: LogitChunks | None = None,
    linear: Linear | None = None,
    elementwise: Elementwise | None = None,
) -> Tensor:
    """Log-softmax of ``hidden @ weight.T`` at each row's target.

    Logits exist for a part of the rows and of the vocabulary at a time, and are summed in fp32. The backward pass
    computes them again, so memory beyond the result and the gradients stays below a few times ``chunks.elements``
    numbers (and one fp32 copy of ``hidden``) whatever the vocabulary. With a vocabulary cut over a tensor-parallel
    group, maximum, sum and target logit are exchanged once, and every rank's softmax gets its gradient, whether or not
    it holds the target.

    Args:
        hidden: [R, H], the same on every rank of ``group``.
        weight: [V / tp, H], this rank's rows of the head; rank ``i`` holds rows ``i * V / tp`` and on.
        targets: [R] int64 token ids.
        group: the tensor-parallel group; None for a whole vocabulary.
        vocab_size: ids from here on are padding rows of the head: no part of the sum, zero gradient. None: no padding.
        chunks: logits held at a time; None: as is right for a CPU.
        linear: computes the products; None for torch's own.
        elementwise: computes the softmax; None for plain torch.

    Returns:
        [R] float32. The gradient of ``hidden`` is whole on every rank, that of ``weight`` belongs to its own rows.
    """
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    num_real = len(weight) if vocab_size is None else min(max(vocab_size - first, 0), len(weight))
    tools = _Tools(chunks=chunks or LogitChunks(), linear=linear or Linear(), elementwise=elementwise or Elementwise())
    result: Tensor = _TargetLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets - first, num_real, group, tools
    )
    return result


@torch.no_grad()
def log_collisions(
    hidden: Tensor,
    weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunks: LogitChunks | None = None,
    linear: Linear | None = None,
) -> Tensor:
    """Log of the probability that two tokens drawn from the softmax of ``hidden @ weight.T`` are the same one.

    That is the log of the sum of squared probabilities. Arguments and memory as for ``target_logps``; no gradient.

    Returns:
        [R] float32.
    """
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    num_real = len(weight) if vocab_size is None else min(max(vocab_size - first, 0), len(weight))
    chunks, linear = chunks or LogitChunks(), linear or Linear()
    top = torch.full((len(hidden),), -torch.inf, dtype=torch.float32, device=hidden.device)
    total, squares = torch.zeros_like(top), torch.zeros_like(top)
    for part in _vocabulary_chunks(num_real, len(hidden), chunks):
        for rows in _row_chunks(len(hidden), chunks):
            logits = linear.output(hidden[rows], weight[part]).float()  # [rows, part]
            highest = torch.maximum(top[rows], logits.amax(dim=1))
            shrink = (top[rows] - highest).exp_()
            exponentials = logits.sub_(highest[:, None]).exp_()
            total[rows] = total[rows] * shrink + exponentials.sum(dim=1)
            squares[rows] = squares[rows] * shrink.square() + exponentials.square_().sum(dim=1)
            top[rows] = highest
    return _log_of_sum(2 * top, squares, group) - 2 * _log_of_sum(top, total, group)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tools:
    """What a platform computes the head with."""

    chunks: LogitChunks
    linear: Linear
    elementwise: Elementwise


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
        tools: _Tools,
    ) -> Tensor:
        top = torch.full(columns.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        for part in _vocabulary_chunks(num_real, len(columns), tools.chunks):
            for rows in _row_chunks(len(columns), tools.chunks):
                logits = tools.linear.output(hidden[rows], weight[part])  # [rows, part]
                top[rows], total[rows], picked[rows] = tools.elementwise.add_logits(
                    logits, columns[rows] - part.start, top[rows], total[rows], picked[rows]
                )
        normalizer = _log_of_sum(top, total, group)  # log of the sum of exponentials of the whole vocabulary
        _reduce(picked, group, dist.ReduceOp.SUM)
        ctx.save_for_backward(hidden, weight, columns, normalizer)
        ctx.num_real, ctx.group, ctx.tools = num_real, group, tools
        return picked - normalizer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, columns, normalizer = ctx.saved_tensors
        tools: _Tools = ctx.tools
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            grad_weight[ctx.num_real :] = 0
        for part in _vocabulary_chunks(ctx.num_real, len(columns), tools.chunks):
            # bf16 parts are summed in fp32: thousands of small terms would vanish in a bf16 sum.
            grad_part: Tensor | None = None
            for rows in _row_chunks(len(columns), tools.chunks):
                logits = tools.linear.output(hidden[rows], weight[part])
                slope = tools.elementwise.slope(logits, columns[rows] - part.start, normalizer[rows], grads[0][rows])
                if grad_hidden is not None:
                    grad_hidden[rows] += tools.linear.grad_input(slope, weight[part])
                if wants_weight:
                    product = tools.linear.grad_weight(slope, hidden[rows])
                    grad_part = product if grad_part is None else grad_part.float().add_(product)
            if grad_weight is not None:  # a context-parallel rank may have no row at all
                grad_weight[part] = 0 if grad_part is None else grad_part
        if grad_hidden is not None:
            _reduce(grad_hidden, ctx.group, dist.ReduceOp.SUM)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _log_of_sum(top: Tensor, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R] logarithm of the group's sum of ``total * exp(top)``."""
    highest = top.clone()
    _reduce(highest, group, dist.ReduceOp.MAX)
    total.mul_((top - highest).exp_())
    _reduce(total, group, dist.ReduceOp.SUM)
    return total.log_().add_(highest)


def _row_chunks(num_rows: int, chunks: LogitChunks) -> Iterator[slice]:
    return _slices(num_rows, min(chunks.rows, chunks.elements))


def _vocabulary_chunks(num_real: int, num_rows: int, chunks: LogitChunks) -> Iterator[slice]:
    if chunks.columns is not None:  # equal parts: a compiled kernel sees one width
        return _slices(num_real, _share(num_real, chunks.columns))
    rows = max(1, min(num_rows, chunks.rows, chunks.elements))
    return _slices(num_real, chunks.elements // rows)


def _share(length: int, most: int) -> int:
    """The size of equal parts of ``length``, none larger than ``most``; but for the last one a multiple of 64."""
    size = -(-max(length, 1) // max(1, -(-length // most)))
    return min(-(-size // 64) * 64, most)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _reduce(values: Tensor, group: dist.ProcessGroup | None, operation: Any) -> None:
    if group is not None:
        dist.all_reduce(values, op=operation, group=group)
