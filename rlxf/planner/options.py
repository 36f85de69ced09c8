"""Layouts of one role on a number of devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlxf.planner.jobs import EngineJob, ForwardJob, Layout, Pass, Shape, TrainJob
from rlxf.planner.time import Stage

Job = TypeVar("Job", TrainJob, EngineJob, ForwardJob, tuple[ForwardJob, ...])
_POWERS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option(Generic[Job]):
    """One layout of a role, and what it costs."""

    job: Job
    stage: Stage
    bytes: float  # on a device, at the worst instant, if no other role is there

    @property
    def seconds(self) -> float:
        return self.stage.seconds


def pareto(options: Iterable[Option[Job]]) -> list[Option[Job]]:
    """Fastest first; each slower one needs less memory than all before it."""
    kept: list[Option[Job]] = []
    for option in sorted(options, key=lambda option: (option.seconds, option.bytes)):
        if not kept or option.bytes < kept[-1].bytes:
            kept.append(option)
    return kept


def counts(num_devices: int, per_node: int) -> list[int]:
    """Numbers of devices that are worth a try: small ones, and those that fill machines or halves of them."""
    half = max(per_node // 2, 1)
    return sorted({n for n in range(1, num_devices + 1) if n in (1, 2, 3, 6) or n % half == 0})


def splits(count: int, per_node: int, first: int = 0) -> tuple[int, ...]:
    """``count`` devices on machines of ``per_node``, of which ``first`` devices are taken: ``(4, 8)``."""
    found: list[int] = []
    room = per_node - first % per_node
    while count > 0:
        found.append(min(count, room))
        count, room = count - found[-1], per_node
    return tuple(found)


def sizes(heads: int, per_node: int) -> Iterator[int]:
    """Tensor-parallel sizes inside one machine."""
    return (size for size in _POWERS if size <= per_node and heads % size == 0)


def layouts(shape: Shape, devices: int, per_node: int, cp: int = 1) -> Iterator[Layout]:
    """All layouts of a model on so many devices: tensor parallelism stays inside a machine, stages are equal."""
    for tp in sizes(shape.heads, per_node):
        if shape.ffn % tp or (shape.kv_heads % tp and tp % shape.kv_heads):
            continue
        for pp in _POWERS:
            if shape.layers % pp == 0 and devices % (tp * pp * cp) == 0:
                dp = devices // (tp * pp * cp)
                yield Layout(tp=tp, pp=pp, cp=cp, dp=dp, sequence_parallel=tp > 1)


def with_budget(largest: Pass, budget: int) -> Pass:
    """The same pass filled up to a token budget."""
    rows = max(round(largest.rows * budget / largest.tokens), 1)
    return Pass(tokens=budget, rows=rows, sequences=min(largest.sequences, 2), budget=True)
