"""Bytes of tensors between forward and backward: what is kept, and what comes on top while a pass computes.

Each term is a tensor that the autograd of our modules saves (``rlxf/models/megatron/modules.py``). Two kinds of code
save different tensors:

- on a CPU an operation at a time: a norm keeps its input in fp32 and what it is before its weight, attention works in
  fp32, the gate keeps ``silu(gate)``, too;
- on a device one kernel each: a norm keeps its input, attention its inputs and its output, the gate its input. An NPU's
  rotation keeps what it turns (op-plugin, ``npu_rotary_mul``), and its attention two [T, heads, 8] of fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from rlxf.planner.jobs import BYTES, Layout, Lora, Precision, Recompute, Shape
from rlxf.planner.states import linears

_FP32 = 4
_INDEX = 8  # of int64
_NPU_SOFTMAX = 2 * 8 * _FP32  # of each query and head: npu_fusion_attention's maximum and sum


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What attention sees of a stream of tokens on one rank, where it is not just the block's own rows."""

    keys: int  # rows of keys and values, over all blocks of queries
    masked: int  # numbers of the masks of blocks with more keys than queries; only a CPU makes them


def seen(tokens: int, sequences: int, shared: int = 0, *, cp: int = 1, together: int = 2) -> Seen | None:
    """What the blocks of a stream see; None: every block sees its own rows.

    Args:
        tokens: of the stream.
        sequences: in it, taken as equally long.
        shared: of ``tokens``, those of prompts that sequences share.
        cp: context-parallel ranks. They gather keys and values, and each has an early and a late chunk of the stream.
        together: sequences that share a prompt.
    """
    sequences = max(sequences, 1)
    units = max(sequences // together, 1) if shared else sequences
    if cp > 1:
        # The two chunks begin in the middle of a sequence, of which they see everything before.
        length, chunk = max(tokens // units, 1), -(-tokens // (2 * cp))
        starts = [(rank * chunk % length, (2 * cp - 1 - rank) * chunk % length) for rank in range(cp)]
        keys, masked = max(
            (2 * chunk + sum(pair), sum(min(chunk, length - s) * (s + min(chunk, length - s)) for s in pair if s))
            for pair in starts
        )
        return Seen(keys=keys + together * shared // cp, masked=masked)
    if not shared:
        return None
    own = (tokens - shared) // (units * together)  # of a completion
    prompt = shared // units
    return Seen(keys=tokens + together * shared, masked=units * together * own * (own + prompt))


def activation_bytes(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    recompute: Recompute,
    tokens: int,
    passes: int = 1,
    lora: Lora | None = None,
    *,
    rows: int | None = None,
    view: Seen | None = None,
    kind: str = "cuda",
) -> Mapping[str, float]:
    """What the backward pass of ``tokens`` needs, by component, on the pipeline stage that keeps most.

    The parts of a layer: ``norms`` (their inputs are the residual stream), ``linear inputs`` (of query, key and value,
    and of gate and up), ``head norms``, ``attention``, ``projection in``, ``gate and up``, ``product``, ``adapters``;
    with ``recompute = full`` only ``layer inputs``. Then ``positions`` (tokens and angles), ``head``, ``stage ends``,
    ``gather buffer`` (sequence parallelism on a device).

    Args:
        shape: the model's.
        layout: its parallel sizes.
        precision: of its parameters.
        recompute: what the backward pass computes again.
        tokens: of one forward pass, before CP cuts it.
        passes: micro-batches of a mini-batch; of these a pipeline stage keeps as many as stages follow, and its own.
        lora: only adapters train.
        rows: that the head reads, before CP cuts them; None: all.
        view: what attention sees; None: each block its own rows.
        kind: "npu", "cuda" or "cpu".
    """
    own = -(-tokens // layout.cp)
    read = own if rows is None else -(-rows // layout.cp)
    layers = shape.layers // layout.pp
    layer = layer_bytes(shape, layout, precision, recompute, own, lora, view, kind)
    positions = position_bytes(shape, precision, own, view)
    best: dict[str, float] = {}
    for stage in sorted({0, layout.pp - 1}):
        flying = _in_flight(layout, stage, passes)
        found = {name: flying * layers * value for name, value in layer.items()}
        found["positions"] = flying * positions
        if (
            layout.sequence_parallel and kind != "cpu"
        ):  # Megatron's own linear gathers into a buffer that it never frees
            found["gather buffer"] = own * BYTES[precision] * shape.hidden
        if layout.pp > 1:
            found["stage ends"] = flying * _stage_ends(shape, layout, precision, recompute, own, stage, kind)
        if stage == layout.pp - 1:
            local = own // layout.tp if layout.sequence_parallel else own
            found["norms"] = found.get("norms", 0) + norm_bytes(
                shape.hidden, local, precision, kind, trains=lora is None
            )
            found["head"] = read * (shape.hidden * BYTES[precision] + (0 if shape.scores else 2 * _INDEX + _FP32))
        if sum(found.values()) > sum(best.values()):
            best = found
    return best


def _in_flight(layout: Layout, stage: int, passes: int) -> float:
    """Micro-batches whose activations a stage keeps at a time, in whole stages of layers (1F1B, Narayanan et al. 2021).

    With interleaved stages a rank keeps so many chunks, each a ``vp``-th of its layers.
    """
    if layout.vp == 1:
        return min(layout.pp - stage, passes)
    chunks = min((layout.pp - stage - 1) * 2 + (layout.vp - 1) * layout.pp + 1, passes * layout.vp)
    return chunks / layout.vp


def norm_bytes(size: int, rows: float, precision: Precision, kind: str, *, trains: bool) -> float:
    """Of a norm over ``size`` numbers: its input, the factor of every row, and on a CPU the result before the weight.

    The input is a copy in fp32 on a CPU, and the residual stream itself elsewhere.
    """
    width = BYTES[precision]
    if kind != "cpu":
        return rows * (width * size + _FP32)
    return rows * (_FP32 * size + _FP32 + (width * size if trains else 0))


@lru_cache(maxsize=4096)
def layer_bytes(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    recompute: Recompute,
    own: int,
    lora: Lora | None,
    view: Seen | None,
    kind: str,
) -> Mapping[str, float]:
    """Of one layer and one pass; ``own``: tokens of the rank."""
    width, tp = BYTES[precision], layout.tp
    local = own / tp if layout.sequence_parallel else float(own)  # tokens where sequence parallelism cuts them
    if recompute == "full":
        return {"layer inputs": local * width * shape.hidden}
    trains = lora is None
    kept = [linear.name for linear in linears(shape, tp) if lora is None or linear.name in lora.targets]
    # Under sequence parallelism a CPU keeps the gathered input of a linear, Megatron's own linear its share.
    gathered = own if kind == "cpu" and trains else local
    found = {"norms": 2 * norm_bytes(shape.hidden, local, precision, kind, trains=trains)}
    inputs = ("linear_qkv" in kept) + ("linear_fc1" in kept)
    found["linear inputs"] = inputs * gathered * width * shape.hidden
    heads = head_sizes(shape, tp)
    if shape.qk_norm:
        found["head norms"] = _head_norms(heads, own, precision, kind, trains=trains)
    found["attention"] = _attention(shape, heads, own, precision, recompute, view, kind)
    shares_output = kind != "cpu" and recompute == "none"  # the kernel keeps its output, which the projection reads
    found["projection in"] = 0 if shares_output or "linear_proj" not in kept else own * width * heads.query
    ffn = shape.ffn // tp
    found["gate and up"] = own * width * ffn * (3 if kind == "cpu" else 2)
    found["product"] = own * width * ffn if "linear_fc2" in kept else 0
    if lora is not None:
        found["adapters"] = sum(
            own * width * lora.rank if name in ("linear_qkv", "linear_fc1") else local * width * lora.rank
            for name in kept
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Numbers of a token on one rank."""

    query: int
    key: int  # as many of value
    packed: int  # all three, as the linear gives them; with fewer key/value heads than ranks those of all ranks
    groups: int  # key/value heads
    heads: int
    size: int


def head_sizes(shape: Shape, tp: int) -> Heads:
    """With fewer key/value heads than ranks, several ranks share a head, and each gathers what all linears gave."""
    groups = max(shape.kv_heads // tp, 1)
    both = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    return Heads(
        query=shape.heads // tp * shape.head_size,
        key=groups * shape.head_size,
        packed=both if shape.kv_heads < tp else both // tp,
        groups=groups,
        heads=shape.heads // tp,
        size=shape.head_size,
    )


def _head_norms(heads: Heads, own: int, precision: Precision, kind: str, *, trains: bool) -> float:
    """Norms of queries and keys. Keys are a part of what the linear gave, and keep all of it unless they are copied."""
    width = BYTES[precision]
    query = norm_bytes(heads.size, own * heads.heads, precision, kind, trains=trains)
    key = norm_bytes(heads.size, own * heads.groups, precision, kind, trains=trains)
    if kind == "cpu" and precision != "fp32":
        return query + key
    if heads.groups == 1:  # queries of one group are such a part, too
        query -= own * width * heads.query
    return query + key + own * width * (heads.packed - heads.key)


def _attention(
    shape: Shape, heads: Heads, own: int, precision: Precision, recompute: Recompute, view: Seen | None, kind: str
) -> float:
    """Queries, keys, values, and what the kernel keeps of its result."""
    width = BYTES[precision]
    copies = kind == "cpu" and precision != "fp32"
    # Values are a part of what the linear gave, and keep all of it unless they are copied, or a norm keeps it.
    packed = 0 if shape.qk_norm and not copies else own * width * heads.packed
    if recompute == "selective":  # what goes into the part that is computed again
        if shape.qk_norm:
            return packed + own * width * (heads.query + heads.key)
        return packed + (own * width * heads.query if heads.groups > 1 else 0)
    wide = _FP32 if kind == "cpu" else width
    keys = own if view is None else view.keys
    total = own * wide * heads.query + keys * wide * heads.key
    if copies or view is not None:
        total += keys * wide * heads.key
    if kind == "npu" or not (copies or view is not None):
        total += packed
    if kind == "npu":  # what it turns
        own_key = heads.key if shape.qk_norm else 0
        total += own * width * (own_key + (heads.query if shape.qk_norm or heads.groups > 1 else 0))
    total += own * wide * heads.query  # the output
    total += own * heads.heads * (_NPU_SOFTMAX if kind == "npu" else _FP32)
    if kind == "cpu" and view is not None:
        total += _FP32 * view.masked
    return total


def position_bytes(shape: Shape, precision: Precision, own: int, view: Seen | None) -> float:
    """Tokens, their cosines and sines, and the rows of keys that each block sees; once for all layers."""
    rows = 0 if view is None else view.keys
    return own * (_INDEX + 2 * BYTES[precision] * shape.head_size) + _INDEX * rows


def _stage_ends(
    shape: Shape, layout: Layout, precision: Precision, recompute: Recompute, own: int, stage: int, kind: str
) -> float:
    """Tensors that the schedule of a pipeline keeps for the backward pass, where autograd does not keep them anyway."""
    local = own / layout.tp if layout.sequence_parallel else own
    one = local * BYTES[precision] * shape.hidden
    sent = one if stage < layout.pp - 1 else 0.0
    copies = kind == "cpu" and precision != "fp32" and recompute != "full"  # the first norm keeps a copy in fp32
    received = one if stage > 0 and copies else 0.0
    return sent + received
