"""Which tensor travels in which message. Pure: names, shapes and offsets, no data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; every tensor of a bucket starts on a cache line, so a view of it is aligned for any dtype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor on the wire, by the name that Hugging Face gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a torch dtype's name: "float32", "bfloat16"
    offset: int = 0  # bytes from the start of its bucket

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One message: whole layers, so that an engine which repacks a complete layer never waits for the rest of it."""

    tensors: tuple[TensorSpec, ...]
    num_bytes: int

    def views(self, payload: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each entry, as views of ``payload`` ([num_bytes] uint8)."""
        for spec in self.tensors:
            raw = payload[spec.offset : spec.offset + spec.num_bytes]
            yield spec.name, raw.view(getattr(torch, spec.dtype)).view(spec.shape)

    def fill(self, payload: Tensor, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors of this bucket, from any device, to their places in ``payload`` ([num_bytes] uint8)."""
        places = dict(self.views(payload))
        for name, tensor in tensors:
            places[name].copy_(tensor)


WINDOW = 2  # buckets that have room at a time: the actor writes one while the engines read the one before


@dataclass(frozen=True, slots=True)
class Room:
    """Where each bucket of a plan lies in one piece of memory."""

    starts: tuple[int, ...]  # of each bucket, bytes
    size: int  # bytes

    @classmethod
    def of(cls, plan: Sequence[Bucket], *, each: bool = False, alignment: int = ALIGNMENT) -> Room:
        """Room for the largest bucket ``WINDOW`` times, used in turn; or (``each``) for all buckets."""
        sizes = [-(-bucket.num_bytes // alignment) * alignment for bucket in plan]
        if each:
            return cls(tuple(accumulate(sizes[:-1], initial=0)), sum(sizes))
        slots = min(WINDOW, len(plan))
        return cls(tuple(index % slots * max(sizes) for index in range(len(plan))), slots * max(sizes))

    def slot(self, memory: Tensor, index: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 view of where bucket ``index`` is written; others may be written there, too."""
        return memory[self.starts[index] : self.starts[index] + num_bytes]


def plan_buckets(tensors: Iterable[TensorSpec], max_bytes: int) -> tuple[Bucket, ...]:
    """Buckets of whole layers, each up to ``max_bytes`` (one layer may exceed it).

    Layers keep the order in which they first appear; a tensor outside of the layers counts as a layer of its own.
    """
    layers: dict[str, list[TensorSpec]] = {}
    for spec in tensors:
        layers.setdefault(_layer_of(spec), []).append(spec)
    buckets: list[Bucket] = []
    current: list[TensorSpec] = []
    size = 0
    for specs in layers.values():
        layer_bytes = sum(_aligned(spec.num_bytes) for spec in specs)
        if current and size + layer_bytes > max_bytes:
            buckets.append(Bucket(tuple(current), size))
            current, size = [], 0
        for spec in specs:
            current.append(TensorSpec(spec.name, spec.shape, spec.dtype, size))
            size += _aligned(spec.num_bytes)
    if current:
        buckets.append(Bucket(tuple(current), size))
    return tuple(buckets)


_LAYER = re.compile(r".*?\.layers\.\d+\.")


def _layer_of(spec: TensorSpec) -> str:
    match = _LAYER.match(spec.name)
    return match.group() if match else spec.name


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
