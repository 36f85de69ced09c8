"""The planner's tables, as a dry run prints them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlxf.core.memory import GIB
from rlxf.placement.text import aligned
from rlxf.planner.estimate import Estimate, own_way, paces
from rlxf.planner.memory import Bar, PlaceMemory
from rlxf.planner.overrides import typed
from rlxf.planner.search import Found
from rlxf.planner.ways_out import WayOut

RED, PLAIN = "\033[31m", "\033[0m"
_TITLES = {
    "gen": "sampling",
    "adv": "scores",
    "ref": "reference",
    "update_actor": "update",
    "sync": "push of weights",
}


def memory_table(found: Estimate, *, color: bool = False) -> str:
    """Memory of a device of each place: both bars, what is in the worst instant, what is left."""
    device = found.device
    whole = "all processes together" if device.is_cpu else "one device"
    lines = [f"memory, estimate, GiB of {device.memory / GIB:.1f} ({device.file.title}, {whole})"]
    rows: list[tuple[str, ...]] = [("devices", "roles", *_bars(found), "worst instant", "left")]
    marks = [False]
    for place in found.memory:
        rows.append(_memory_row(found, place))
        marks.append(found.room(place) < 0)
    table = aligned(rows)
    lines += [f"{RED}{line}{PLAIN}" if color and bad else line for line, bad in zip(table, marks, strict=True)]
    for place in found.memory:
        bar, instant = place.worst
        parts = sorted(instant.parts.items(), key=lambda part: -part[1])
        held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= GIB / 200)
        lines.append(f"  {_roles(place)}, {bar.name}, {instant.name}: {held}")
        if place.utilization is not None:
            lines.append(f"  {_roles(place)}: rollout.gpu_memory_utilization {place.utilization:.2f}")
    return "\n".join(lines) + "\n"


def _bars(found: Estimate) -> list[str]:
    return list(dict.fromkeys(bar.name for place in found.memory for bar in place.bars))


def _memory_row(found: Estimate, place: PlaceMemory) -> tuple[str, ...]:
    sizes: dict[str, Bar] = {bar.name: bar for bar in place.bars}
    shown = [f"{sizes[name].worst.total / GIB:.1f}" if name in sizes else "" for name in _bars(found)]
    bar, instant = place.worst
    left = found.room(place) / GIB
    text = f"{left:.1f}" if left >= 0 else f"{left:.1f} DOES NOT FIT"
    return (str(place.place.devices), _roles(place), *shown, f"{bar.name}: {instant.name}", text)


def _roles(place: PlaceMemory) -> str:
    return "+".join(place.place.roles)


def out_of_memory(found: Estimate, ways: Sequence[WayOut]) -> list[str]:
    """What does not fit, and what to type so that it does."""
    lines = found.shortages()
    if not ways:
        lines.append(
            "no smaller change is known that fits: give the roles more devices, or search with plan.devices="
            f"{2 * found.jobs.num_devices}x{found.device.name}"
        )
    for way in ways:
        more = way.estimate.jobs.num_devices - found.jobs.num_devices
        cost = f"{way.estimate.pace.seconds:.3g} s a step" + (f", {more} devices more" if more else "")
        lines.append(f"  fits, {cost}: {' '.join(typed(way.overrides))}")
    return lines


def time_table(found: Estimate) -> str:
    """Seconds of each stage, and of a step in several ways of overlapping; dollars if a price is known."""
    work, jobs = found.jobs.work, found.jobs
    lengths = f"{work.prompt_tokens:.0f} tokens of prompt, {work.completion_tokens:.0f} of completion"
    lines = [f"time, estimate, seconds of a step of {work.prompts} rows ({lengths})"]
    rows: list[tuple[str, ...]] = [("stage", "devices", "seconds", "device-seconds", "TFLOP", "MFU")]
    for name, stage in found.stages.items():
        rows.append(
            (
                _TITLES.get(name, name),
                str(stage.devices),
                f"{stage.seconds:.3g}",
                f"{stage.seconds * stage.devices:.3g}",
                f"{stage.flops / 1e12:.3g}",
                _mfu(found, name),
            )
        )
    lines += aligned(rows)
    rows = [("pace", "seconds", "devices busy", *(f"busy {role}" for role in jobs.devices))]
    for name, pace in paces(found).items():
        mark = " <- this recipe" if name == own_way(jobs) else ""
        busy = [f"{pace.busy.get(role, 0.0):.0%}" for role in jobs.devices]
        rows.append((name, f"{pace.seconds:.3g}", f"{pace.busy_all:.0%}", *busy[:-1], busy[-1] + mark))
    lines += ["", *aligned(rows)]
    if found.dollars is not None:
        lines.append(f"1,000 steps: {found.dollars:,.0f} dollars at {found.price:g} an hour for each device")
    return "\n".join(lines) + "\n"


def _mfu(found: Estimate, name: str) -> str:
    stage = found.stages[name]
    peak = found.device.peak(found.jobs.train.precision) * stage.devices * stage.seconds
    return f"{stage.flops / peak:.2f}" if stage.flops and peak else ""


def search_table(found: Sequence[Found], chosen: Estimate, num_devices: int) -> str:
    """The best layouts, and how far the recipe is from the first one."""
    device = chosen.device
    lines = [f"search, estimate: layouts for {num_devices} x {device.name} ({device.file.title}), fastest first"]
    if not found:
        return lines[0] + f"\nno layout fits into {num_devices} devices; try more of them, or larger ones\n"
    rows: list[tuple[str, ...]] = [("", "devices", "layout", "lookahead", "seconds", "busy", "GiB", "left")]
    for place, one in enumerate(found, 1):
        rows.append((f"{place}.", *_found_row(one)))
    lines += aligned(rows)
    for place, one in enumerate(found, 1):
        lines.append(f"{place}. {' '.join(typed(one.overrides)) or 'the recipe as it is'}")
    best = found[0].estimate
    if chosen.fits:
        ratio = chosen.pace.seconds / best.pace.seconds
        used = f"on {chosen.jobs.num_devices} devices"
        lines.append(f"the recipe as it is: {chosen.pace.seconds:.3g} s a step {used}, {ratio:.2f} times the first one")
    else:
        lines.append("the recipe as it is does not fit")
    return "\n".join(lines) + "\n"


def _found_row(one: Found) -> Iterator[str]:
    estimate, jobs = one.estimate, one.estimate.jobs
    yield str(jobs.num_devices)
    layouts = [f"train {jobs.train.layout.devices} ({jobs.train.layout})"]
    if jobs.engine is not None:
        layouts.append(f"infer {jobs.engine.devices} (TP{jobs.engine.tp})")
    frozen = [("ref", jobs.reference), ("reward", jobs.rewards[0] if jobs.rewards else None)]
    layouts += [f"{role} {job.layout.devices} ({job.layout})" for role, job in frozen if job is not None]
    together = f"; together: {', '.join(one.together)}" if one.together else ""
    yield ", ".join(layouts) + together
    yield str(jobs.lookahead)
    yield f"{estimate.pace.seconds:.3g}"
    yield f"{estimate.pace.busy_all:.0%}"
    yield f"{estimate.fullest.worst[1].total / GIB:.1f}"
    yield f"{estimate.room(estimate.fullest) / GIB:.1f}"
