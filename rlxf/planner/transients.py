"""Bytes that exist on top of states and kept activations while a pass computes, at the worst moment of each pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlxf.planner.activations import Seen, head_sizes, layer_bytes, position_bytes
from rlxf.planner.jobs import BYTES, Layout, Lora, Precision, Recompute, Shape
from rlxf.planner.states import linears, vocab_rows

_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """``LogitChunks`` of a platform (``rlxf/platform``): how much of the logits exists at a time."""

    elements: int
    rows: int
    columns: int | None = None

    def part(self, rows: int, vocab: int) -> tuple[int, int]:
        """Rows and columns of the largest part."""
        held = max(min(rows, self.rows, self.elements), 1)
        if self.columns is not None:
            return held, min(self.columns, vocab)
        return held, min(self.elements // held, vocab)


CHUNKS: Mapping[str, Chunks] = {
    "cpu": Chunks(elements=2**21, rows=1024),
    "cuda": Chunks(elements=2**28, rows=2**13, columns=2**15),
    "npu": Chunks(elements=2**27, rows=2**12, columns=2**15),
}


def forward_bytes(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    tokens: int,
    *,
    rows: int | None = None,
    view: Seen | None = None,
    lora: Lora | None = None,
    kind: str = "cuda",
) -> float:
    """Most that a forward pass without gradient has at a time: in the MLP, in attention, or in the head.

    While a part computes, four streams of hidden states exist in the MLP and three in attention: what the layer got,
    the residual, the input of the linear, and what the caller holds.
    """
    width, own = BYTES[precision], -(-tokens // layout.cp)
    read = own if rows is None else -(-rows // layout.cp)
    local = own / layout.tp if layout.sequence_parallel else float(own)
    stream = local * width * shape.hidden
    gathered = own * width * shape.hidden if layout.sequence_parallel else 0
    buffer = gathered if kind != "cpu" else 0  # Megatron's own linear gathers into one that it never frees
    ffn = own * width * (shape.ffn // layout.tp)
    mlp = max(ffn * (4 if kind == "cpu" else 3), 2 * ffn + gathered - buffer) + 4 * stream + buffer
    if lora is not None:
        mlp = max(mlp, adapter_bytes(shape, layout, precision, own, lora) + 3 * stream + gathered)
    attention = _attention_bytes(shape, layout, precision, own, view, kind) + 3 * stream + buffer
    head = stream + gathered + read * width * shape.hidden
    if not shape.scores:
        head += logit_bytes(shape, layout, precision, read, kind)
    return position_bytes(shape, precision, own, view) + max(mlp, attention, head)


def adapter_bytes(shape: Shape, layout: Layout, precision: Precision, own: int, lora: Lora) -> float:
    """A linear's result, the adapter's, and one of it times its scale or the sum of both; of the widest linear."""
    widths = (linear.rows for linear in linears(shape, layout.tp) if linear.name in lora.targets)
    return 3.0 * own * BYTES[precision] * max(widths, default=0)


def _attention_bytes(
    shape: Shape, layout: Layout, precision: Precision, own: int, view: Seen | None, kind: str
) -> float:
    width, heads = BYTES[precision], head_sizes(shape, layout.tp)
    total = own * width * (heads.packed + 2 * heads.query + heads.key)  # before and after the rotation
    if view is not None:
        total += 2 * view.keys * width * heads.key
    if layout.cp > 1:
        total += 2 * own * layout.cp * width * heads.key  # gathered
    if kind != "cpu":
        return total + own * width * heads.query
    if precision != "fp32":
        keys = own if view is None else view.keys
        total += _FP32 * (own * heads.query + 2 * keys * heads.key)
    return total + 2 * own * _FP32 * heads.query  # block by block, then side by side


def logit_bytes(shape: Shape, layout: Layout, precision: Precision, rows: int, kind: str) -> float:
    """A part of the logits while log-probabilities are computed. A compiled kernel makes no copy in fp32."""
    held, columns = CHUNKS[kind].part(rows, vocab_rows(shape, layout.tp))
    copies = precision != "fp32" and kind != "cuda"
    return held * columns * (BYTES[precision] + (_FP32 if copies else 0))


def backward_bytes(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    recompute: Recompute,
    tokens: int,
    *,
    rows: int | None = None,
    view: Seen | None = None,
    lora: Lora | None = None,
    kind: str = "cuda",
) -> Mapping[str, float]:
    """What a backward pass needs beside what the forward pass kept: for the head, or for the last layer."""
    width, own = BYTES[precision], -(-tokens // layout.cp)
    read = own if rows is None else -(-rows // layout.cp)
    local = own / layout.tp if layout.sequence_parallel else float(own)
    stream = local * width * shape.hidden
    head = {} if shape.scores else _head_gradients(shape, layout, precision, read, kind, trains=lora is None)
    layer = {"gradients of activations": _layer_gradients(shape, layout, precision, own, stream, lora, kind)}
    if recompute != "none":
        again = layer_bytes(shape, layout, precision, "none", own, lora, view, kind)
        kept = layer_bytes(shape, layout, precision, recompute, own, lora, view, kind)
        layer["computed again"] = sum(again.values()) - sum(kept.values())
    if not shape.scores and shape.tied and layout.pp == 1 and lora is None:
        # Autograd adds both gradients of a tied weight before anything has them: the head's waits to the end.
        layer["gradient of the head"] = width * vocab_rows(shape, layout.tp) * shape.hidden
    return max((head, layer), key=lambda parts: sum(parts.values()))


def _head_gradients(
    shape: Shape, layout: Layout, precision: Precision, rows: int, kind: str, *, trains: bool
) -> dict[str, float]:
    """``_TargetLogps.backward`` (``rlxf/models/logps.py``)."""
    width, vocab = BYTES[precision], vocab_rows(shape, layout.tp)
    held, columns = CHUNKS[kind].part(rows, vocab)
    copies = precision != "fp32" and kind != "cuda"
    makes_new = precision != "fp32" or kind == "cuda"  # else the slope is written into the logits
    found = {
        "logits": float(held * columns * (width + (_FP32 if copies else 0) + (width if makes_new else 0))),
        "gradients of activations": float(rows * shape.hidden * _FP32 + held * shape.hidden * width),
    }
    if trains:
        sums = _FP32 if rows > held else 0  # several chunks of rows are added in fp32
        found["gradient of the head"] = float(vocab * shape.hidden * width + columns * shape.hidden * (width + sums))
    return found


def _layer_gradients(
    shape: Shape, layout: Layout, precision: Precision, own: int, stream: float, lora: Lora | None, kind: str
) -> float:
    """Of the last layer, whose activations are all there yet.

    In the MLP: the stream's gradient, and two of the width of gate and up together, or one of that of the product and
    the gradient of the last linear's weight. In the final norm on a CPU: four tensors in fp32 of the stream's size.
    """
    width, ffn = BYTES[precision], shape.ffn // layout.tp
    last = 0 if lora is not None else width * linears(shape, layout.tp)[-1].numbers
    gathered = own * width * shape.hidden if layout.sequence_parallel else 0
    mlp = stream + gathered + own * width * ffn + max(own * width * ffn, last)
    if lora is not None:
        mlp += own * width * shape.hidden  # times the adapter's scale
    if kind != "cpu":
        return max(mlp, 2 * stream)
    norm = stream * (4 if precision == "fp32" else 3 + 3 * _FP32 / width)
    return max(mlp, norm)
