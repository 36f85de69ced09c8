"""``plan.json`` of a run folder: the plan of its recipe, and after the third step what was measured beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from rlxf.config.kinds import Role
from rlxf.core.memory import GIB
from rlxf.planner.device import Device
from rlxf.planner.estimate import Estimate
from rlxf.planner.jobs import Work
from rlxf.planner.measured import Compared, Row
from rlxf.planner.memory import Instant, PlaceMemory
from rlxf.planner.time import Stage

NAME = "plan.json"
_NOTE = "An estimate by formulas, from the figures of the device below. `measured` is what the run measured."


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the first steps of a process say about the estimate."""

    steps: tuple[int, ...]
    work: Work  # of one of them
    seconds: Mapping[str, Compared]  # by stage; planned for what these steps worked on
    memory: Mapping[str, Compared]  # by metric, GiB

    @property
    def ratios(self) -> dict[str, float]:
        """``plan/<stage>_ratio`` and ``plan/memory_<role>_ratio``."""
        seconds = {f"plan/{name}_ratio": one.ratio for name, one in self.seconds.items()}
        return seconds | {f"plan/memory_{role_of(name)}_ratio": one.ratio for name, one in self.memory.items()}


def record(estimate: Estimate, measured: Measured | None = None) -> dict[str, Any]:
    """The content of ``plan.json``. ``metrics`` holds planned numbers by the names of metrics, each of them once."""
    found: dict[str, Any] = {
        "note": _NOTE,
        "device": _device(estimate.device),
        "work": asdict(estimate.jobs.work),
        "places": [_place(memory) for memory in estimate.memory],
        "stages": {name: _stage(stage) for name, stage in estimate.stages.items()},
        "pace": asdict(estimate.pace),
        "metrics": _metrics(estimate, measured),
    }
    if measured is not None:
        found["measured"] = {
            "steps": list(measured.steps),
            "work": asdict(measured.work),
            "stages": {name: _compared(one, "s") for name, one in measured.seconds.items()},
            "memory": {name.removeprefix("memory/"): _compared(one, "gib") for name, one in measured.memory.items()},
        }
    return found


def _device(device: Device) -> dict[str, Any]:
    facts = device.file.model_dump(exclude_none=True)
    figures = {key: value for key, value in facts.items() if isinstance(value, dict)}
    return {"name": device.name, **{key: facts[key] for key in facts.keys() - figures.keys()}, "figures": figures}


def _place(memory: PlaceMemory) -> dict[str, Any]:
    place = memory.place
    bars = {bar.name: _instant(bar.worst) for bar in memory.bars if bar.instants}
    found = {"pool": place.name, "roles": list(place.roles), "devices": place.devices, "bars": bars}
    return found if memory.utilization is None else found | {"gpu_memory_utilization": memory.utilization}


def _instant(instant: Instant) -> dict[str, Any]:
    parts = {name: round(size) for name, size in instant.parts.items()}
    return {"worst": instant.name, "bytes": round(instant.total), "parts": parts}


def _stage(stage: Stage) -> dict[str, Any]:
    return {"seconds": stage.seconds, "flops": stage.flops, "devices": stage.devices}


def _compared(one: Compared, unit: str) -> dict[str, float]:
    return {f"planned_{unit}": one.planned, f"measured_{unit}": one.measured, "ratio": one.ratio}


def _metrics(estimate: Estimate, measured: Measured | None) -> dict[str, float]:
    """After the third step the seconds are those planned for what the steps really worked on."""
    seconds = {name: stage.seconds for name, stage in estimate.stages.items()}
    if measured is not None:
        seconds |= {name: one.planned for name, one in measured.seconds.items()}
    found = {f"timing/{name}": value for name, value in seconds.items()}
    found |= {name: size / GIB for name, size in process_bytes(estimate).items()}
    if measured is None:
        found["speed/busy"] = estimate.pace.busy_all
    return found


def process_bytes(estimate: Estimate) -> dict[str, float]:
    """What a process holds at most, by the metric that measures it. The first word of a part is its role.

    ``memory/<role>_device_gib``: what the allocator of the device has given out. On a CPU ``memory/<role>_rss_gib``,
    with the program itself; a run in one process has only ``memory/driver_rss_gib``.
    """
    device, jobs = estimate.device, estimate.jobs
    roles: tuple[Role, ...] = get_args(Role)
    held: dict[Role, float] = {}
    for place in estimate.memory:
        processes = max(place.place.devices, 1) if device.is_cpu else 1  # a CPU's memory is of all of them
        for instant in (instant for bar in place.bars for instant in bar.instants):
            for role in roles:
                parts = [size for name, size in instant.parts.items() if name.split()[0] == role]
                held[role] = max(held.get(role, 0.0), sum(parts) / processes)
    held = {role: size for role, size in held.items() if size}
    if jobs.local:
        return {"memory/driver_rss_gib": device.context + sum(held.values())} if device.is_cpu else {}
    if device.is_cpu:
        return {f"memory/{role}_rss_gib": device.context + size for role, size in held.items()}
    return {f"memory/{role}_device_gib": size for role, size in held.items()}


def role_of(metric: str) -> str:
    """``train`` of ``memory/train_device_gib``; ``driver`` where one process has all roles."""
    return metric.removeprefix("memory/").split("_")[0]


def measured_memory(estimate: Estimate, rows: Sequence[Row]) -> dict[str, Compared]:
    """By metric, GiB: the largest of the rows, against the plan."""
    found = {}
    for name, planned in _metrics(estimate, None).items():
        if name.startswith("memory/") and (seen := max((row.get(name, 0.0) for row in rows), default=0.0)):
            found[name] = Compared(planned=planned, measured=seen)
    return found


def table(measured: Measured) -> str:
    """``stage  planned  measured  planned/measured``, one line each."""
    lines = [("stage", "planned", "measured", "planned/measured")]
    for name, one in measured.seconds.items():
        lines.append((name, f"{one.planned:.3g} s", f"{one.measured:.3g} s", f"{one.ratio:.2f}"))
    for name, one in measured.memory.items():
        title = f"memory {role_of(name)}"
        lines.append((title, f"{one.planned:.2f} GiB", f"{one.measured:.2f} GiB", f"{one.ratio:.2f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
