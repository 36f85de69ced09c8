"""Which pairs go into which optimizer step. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from rlxf.core.types import Batch


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


def digest(batch: Batch) -> str:
    """Of everything in a batch: the same for the same rows in the same order, to the bit."""
    found = hashlib.sha256()
    for piece in _pieces(batch):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """The bytes of a value, and of all that it is made of, each with what it is."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().numpy().tobytes()
    elif is_dataclass(value):
        yield type(value).__name__.encode()
        for field in fields(value):
            yield field.name.encode()
            yield from _pieces(getattr(value, field.name))
    else:
        yield repr(value).encode()
