"""Which pairs go into which optimizer step. Pure."""

from __future__ import annotations

import torch
from torch import Tensor


def mini_batches(num_pairs: int, pairs_per_step: int, *, shuffle_key: tuple[int, int, int] | None) -> list[Tensor]:
    """Row indices of each optimizer step; the last one may be short.

    Args:
        num_pairs: pairs of the driver step.
        pairs_per_step: pairs of one optimizer step on all data-parallel ranks together.
        shuffle_key: (seed, driver step, pass) of the order; None keeps the rows as they came.
    """
    order = torch.arange(num_pairs)
    if shuffle_key is not None:
        seed, step, epoch = shuffle_key
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + epoch)
        order = torch.randperm(num_pairs, generator=generator)
    return list(torch.split(order, pairs_per_step))
