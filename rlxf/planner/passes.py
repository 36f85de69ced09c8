"""How the work of a role is cut into forward passes and spread over its ranks, and what the ranks tell each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlxf.planner.device import Device
from rlxf.planner.flops import Rows
from rlxf.planner.jobs import BYTES, Layout, Pass, Precision, Shape

_WHOLE = 4  # from so many units of a pass on, longer and shorter ones fill it up


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The work of the data-parallel rank that has most."""

    rows: Rows
    passes: int  # through the model


def share_of(units: float, unit: Rows, layout: Layout, largest: Pass, together: float) -> Share:
    """The largest share of ``units`` that one rank gets.

    Args:
        units: what stays in one pass, such as the pairs of a prompt.
        unit: counts of one.
        layout: of the role.
        largest: pass.
        together: sequences of a unit.
    """
    mine = float(math.ceil(units / layout.dp - 1e-9)) if layout.dp > 1 else units
    if largest.budget:
        fit = largest.tokens / unit.tokens if unit.tokens else math.inf
        # ``_first_fit`` (rlxf/models/batching.py): units of one size leave room that is too small for one more.
        fit = fit if fit >= _WHOLE else max(math.floor(fit), 1)
    else:
        fit = max(largest.sequences // max(together, 1.0), 1)
    passes = max(math.ceil(mine / fit - 1e-9), 1)
    if layout.vp > 1:  # interleaved stages are filled up
        passes = math.ceil(passes / layout.pp) * layout.pp
    return Share(rows=unit.times(mine), passes=passes)


def exchange_seconds(
    shape: Shape, layout: Layout, precision: Precision, device: Device, share: Share, *, forwards: int, backward: bool
) -> float:
    """Seconds that a rank spends on sums over tensor-parallel ranks, keys of others, and transfers between stages.

    Nothing of it overlaps with products. Under sequence parallelism a sum is a reduce-scatter and an all-gather, which
    move as many bytes.

    Args:
        shape: of the model.
        layout: of the role.
        precision: of what travels.
        device: on which it runs.
        share: of one rank.
        forwards: forward passes, one more where everything is computed again.
        backward: there is a backward pass.
    """
    seconds, size = 0.0, BYTES[precision]
    layers, rounds = shape.layers / layout.pp, forwards + backward
    tokens = share.rows.tokens / layout.cp
    if layout.tp > 1:
        calls = 2 * layers * rounds  # after attention and after the feed-forward block
        seconds += all_reduce_seconds(
            device, layout.tp, layout.tp, calls * share.passes, calls * tokens * shape.hidden * size
        )
    if layout.cp > 1:
        own = 2 * shape.kv_heads * shape.head_size * size / layout.tp * share.rows.tokens
        speed = device.speed(layout.tp * layout.cp)
        calls = layers * rounds
        seconds += calls * (share.passes * 2 * device.latency + (layout.cp - 1) / layout.cp * own / speed)
    if layout.pp > 1:
        calls = layout.vp * (1 + backward)
        state = tokens * shape.hidden * size / (layout.tp if layout.sequence_parallel else 1)
        seconds += calls * (share.passes * device.latency + state / device.speed(layout.devices))
    return seconds


def all_reduce_seconds(device: Device, ranks: int, span: int, calls: float, num_bytes: float) -> float:
    """Of so many calls of together ``num_bytes`` by a ring of ``ranks``, which lie within ``span`` neighbours."""
    return calls * device.latency + 2 * (ranks - 1) / ranks * num_bytes / device.speed(span)


def gradient_seconds(layout: Layout, parameters: float, precision: Precision, device: Device) -> float:
    """Reduce-scatter of fp32 gradients, and all-gather of new weights, over data- and context-parallel ranks.

    Args:
        layout: of the role.
        parameters: trained ones of a rank.
        precision: of the weights.
        device: on which it runs.
    """
    ranks = layout.dp * layout.cp
    if ranks < 2:
        return 0.0
    speed = device.speed(layout.tp * ranks)  # the ranks of a pipeline stage are neighbours
    return 2 * device.latency + (4 + BYTES[precision]) * parameters * (ranks - 1) / ranks / speed


def bubble(layout: Layout, passes: int) -> float:
    """Time of a step over that of its passes: stages wait at its begin and end."""
    return 1 + (layout.pp - 1) / (passes * layout.vp)
