"""Bytes that a model holds between its passes: weights, gradients, and the optimizer's numbers. Exact to the byte.

They are those of megatron-core's buffers (``param_and_grad_buffer``, ``distrib_optimizer``): gradients in fp32 in one
buffer for each chunk of layers, every parameter on a multiple of 64 numbers, every bucket a multiple of the ranks that
share the optimizer (data and context parallel) and of 128. All weights that train lie in such a buffer, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlxf.planner.jobs import BYTES, Layout, Lora, Precision, Shape, TrainJob

_ALIGNMENT = 64  # numbers: where a parameter of a buffer begins
_BUCKET = 128  # numbers: what the size of a bucket is a multiple of
_FP32 = 4
_NF4_BLOCK = 64  # weights that share a scale
_NF4_TABLE = 16 * _FP32  # the values of the 16 codes, of every linear


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """What a role holds between passes, on the rank that holds most."""

    weights: int
    gradients: int = 0
    main: int = 0  # copies of the weights in fp32, for the optimizer
    moments: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.main + self.moments


@dataclass(frozen=True, slots=True)
class _Linear:
    """One rank's share of a linear layer."""

    name: str
    rows: int
    columns: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Layers that a rank computes as one, with what stands before and after them. Sizes in numbers."""

    layers: int
    first: tuple[int, ...] = ()  # embedding
    last: tuple[int, ...] = ()  # final norm and head
    copied: bool = False  # first and last stage have a copy of the embedding, in a bucket of its own


def linears(shape: Shape, tp: int) -> tuple[_Linear, ...]:
    """One rank's share of a layer's linears. Fewer key/value heads than ranks: the packed rows are cut all the same."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    return (
        _Linear("linear_proj", shape.hidden, shape.heads * shape.head_size // tp),
        _Linear("linear_qkv", qkv // tp, shape.hidden),
        _Linear("linear_fc1", 2 * shape.ffn // tp, shape.hidden),
        _Linear("linear_fc2", shape.hidden, shape.ffn // tp),
    )


def vocab_rows(shape: Shape, tp: int) -> int:
    """Rows of the embedding on a rank: every rank has as many."""
    return -(-shape.vocab // tp)


@lru_cache(maxsize=4096)
def state_bytes(shape: Shape, layout: Layout, precision: Precision) -> StateBytes:
    """Of a frozen model."""
    stages = [sum(_whole(shape, layout.tp, chunk) for chunk in chunks) for chunks in _stages(shape, layout)]
    return StateBytes(weights=BYTES[precision] * max(stages))


def trained_state_bytes(job: TrainJob) -> StateBytes:
    """Of the model that is trained, after its first optimizer step."""
    return _trained(job.shape, job.layout, job.precision, job.lora)


@lru_cache(maxsize=4096)
def _trained(shape: Shape, layout: Layout, precision: Precision, lora: Lora | None) -> StateBytes:
    found = [_of_stage(shape, layout, precision, lora, chunks) for chunks in _stages(shape, layout)]
    return max(found, key=lambda state: state.total)


def _of_stage(
    shape: Shape, layout: Layout, precision: Precision, lora: Lora | None, chunks: Sequence[_Chunk]
) -> StateBytes:
    width, shards = BYTES[precision], layout.dp * layout.cp
    layer = _adapter_sizes(shape, layout.tp, lora) if lora is not None else _layer_sizes(shape, layout.tp)
    buckets = [bucket for chunk in chunks for bucket in _buckets(shape, layer, chunk, trains_all=lora is None)]
    padded = sum(bucket.padded(shards) for bucket in buckets)
    share = _largest_share(buckets, shards)
    frozen = 0
    if lora is not None:
        frozen = sum(_frozen(shape, layout.tp, chunk, width, lora) for chunk in chunks)
    return StateBytes(
        weights=frozen + width * padded,
        gradients=_FP32 * padded,
        main=0 if precision == "fp32" else _FP32 * share,  # in fp32 they are the weights themselves
        moments=2 * _FP32 * share,
    )


def _stages(shape: Shape, layout: Layout) -> Iterator[list[_Chunk]]:
    """The chunks of the pipeline stages that differ: the first one, one between, the last one."""
    layers = shape.layers // (layout.pp * layout.vp)
    rows = vocab_rows(shape, layout.tp) * shape.hidden
    copied = shape.tied and layout.pp > 1
    if shape.scores:
        head: tuple[int, ...] = (shape.hidden,)
    elif shape.tied and layout.pp == 1:
        head = ()
    else:
        head = (rows,)
    for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1}):
        chunks = []
        for number in range(layout.vp):
            begins = stage == number == 0
            ends = (stage, number) == (layout.pp - 1, layout.vp - 1)
            chunk = _Chunk(
                layers=layers,
                first=(rows,) if begins else (),
                last=(shape.hidden, *head) if ends else (),
                copied=copied and (begins or ends),
            )
            chunks.append(chunk)
        yield chunks


def _whole(shape: Shape, tp: int, chunk: _Chunk) -> int:
    """Numbers of a chunk, without padding."""
    return chunk.layers * sum(_layer_sizes(shape, tp)) + sum(chunk.first) + sum(chunk.last)


def _layer_sizes(shape: Shape, tp: int) -> tuple[int, ...]:
    """Of the parameters of a layer on a rank, in the order in which the module holds them."""
    proj, qkv, fc1, fc2 = (linear.numbers for linear in linears(shape, tp))
    bias = ((shape.heads + 2 * shape.kv_heads) * shape.head_size // tp,) if shape.qkv_bias else ()
    norms = (shape.head_size, shape.head_size) if shape.qk_norm else ()
    return (shape.hidden, proj, qkv, *bias, *norms, shape.hidden, fc1, fc2)


def _adapter_sizes(shape: Shape, tp: int, lora: Lora) -> tuple[int, ...]:
    sizes = list[int]()
    for linear in linears(shape, tp):
        if linear.name in lora.targets:
            sizes += (lora.rank * linear.columns, linear.rows * lora.rank)
    return tuple(sizes)


def _frozen(shape: Shape, tp: int, chunk: _Chunk, width: int, lora: Lora) -> int:
    """Bytes of the weights that do not train, each in memory of its own."""
    numbers = _whole(shape, tp, chunk) - (shape.hidden if shape.scores and chunk.last else 0)
    if not lora.four_bits:
        return width * numbers
    held = linears(shape, tp)
    packed = sum(_nf4_bytes(linear.numbers) for linear in held)
    return width * (numbers - chunk.layers * sum(linear.numbers for linear in held)) + chunk.layers * packed


def _nf4_bytes(numbers: int) -> int:
    """Half a byte each, a scale for every block, and the table of codes (bitsandbytes' ``quantize_4bit``)."""
    return -(-numbers // 2) + _FP32 * -(-numbers // _NF4_BLOCK) + _NF4_TABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bucket:
    """Parameters of a buffer, last one first: ``before``, ``layer`` as often as there are layers, ``after``."""

    before: tuple[int, ...] = ()
    layer: tuple[int, ...] = ()
    layers: int = 0
    after: tuple[int, ...] = ()

    def padded(self, shards: int) -> int:
        """Numbers of the bucket, with all padding."""
        numbers = sum(map(_aligned, (*self.before, *self.after))) + self.layers * sum(map(_aligned, self.layer))
        size = math.lcm(shards, _BUCKET)
        return -(-numbers // size) * size

    @property
    def is_dense(self) -> bool:
        """No padding between its parameters."""
        return not any(size % _ALIGNMENT for size in (*self.before, *self.layer, *self.after))

    def numbers(self) -> int:
        return sum((*self.before, *self.after)) + self.layers * sum(self.layer)

    def sizes(self) -> tuple[int, ...]:
        return (*self.before, *(self.layer * self.layers), *self.after)


def _buckets(shape: Shape, layer: tuple[int, ...], chunk: _Chunk, *, trains_all: bool) -> list[_Bucket]:
    layer = layer[::-1]
    if not trains_all:
        score = (shape.hidden,) if shape.scores and chunk.last else ()  # it trains beside the adapters
        return [_Bucket(layer=layer, layers=chunk.layers, after=score)]
    first, last = chunk.first, chunk.last
    if shape.scores and last:
        # A parameter of the model itself comes before those of its modules.
        return [_Bucket(before=last[:1], layer=layer, layers=chunk.layers, after=(*first, last[1]))]
    if not chunk.copied:
        return [_Bucket(before=last[::-1], layer=layer, layers=chunk.layers, after=first)]
    alone = _Bucket(before=first or last[1:])
    others = _Bucket(before=() if first else last[:1], layer=layer, layers=chunk.layers)
    return [others, alone]


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT


def _largest_share(buckets: Sequence[_Bucket], shards: int) -> int:
    """Numbers that the optimizer of a rank has: of every bucket an equal share, less the padding in it."""
    if shards == 1:
        return sum(bucket.numbers() for bucket in buckets)
    if all(bucket.is_dense for bucket in buckets):  # then only the last shares have padding
        return sum(min(bucket.padded(shards) // shards, bucket.numbers()) for bucket in buckets)
    held = [0] * shards
    for bucket in buckets:
        share, start = bucket.padded(shards) // shards, 0
        for size in bucket.sizes():
            start, end = _aligned(start), _aligned(start) + size
            for rank in range(start // share, -(-end // share)):
                held[rank] += min(end, (rank + 1) * share) - max(start, rank * share)
            start = end
    return max(held)
