"""Which tensor travels in which message. Pure: names, shapes and offsets, no data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
