"""What a recipe costs on a kind of device: memory, seconds, dollars. All of it is an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlxf.config.devices import find_device
from rlxf.config.plan import CLUSTER, split_devices
from rlxf.config.schema import RunConfig
from rlxf.core.memory import GIB
from rlxf.planner.device import DEFAULTS, Device
from rlxf.planner.jobs import Jobs, jobs_of
from rlxf.planner.memory import PlaceMemory, memory_of
from rlxf.planner.time import Pace, Stage, pace, stages_of

CHUNKS = 8  # of a step, where a plan streams and its recipe does not


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The cost of one recipe."""

    jobs: Jobs
    device: Device
    memory: tuple[PlaceMemory, ...]
    stages: Mapping[str, Stage]
    pace: Pace  # as the recipe has it
    price: float | None  # dollars for an hour of one device

    @property
    def fits(self) -> bool:
        return all(self.room(place) >= 0 for place in self.memory)

    def room(self, place: PlaceMemory) -> float:
        """Bytes that are left on a device at its worst instant; negative: it does not fit.

        The places of a CPU have one memory, and may have their worst instants together.
        """
        there = self.memory if self.device.is_cpu else (place,)
        return self.device.memory - sum(one.worst[1].total for one in there)

    def shortages(self) -> list[str]:
        """What does not fit, a line each, for people; nothing if all fits."""
        have, name = self.device.memory / GIB, self.device.name
        if self.device.is_cpu and not self.fits:
            whole = sum(place.worst[1].total for place in self.memory) / GIB
            return [f"all processes together need {whole:.1f} GiB by estimate; {name} has {have:.1f}"]
        lines = []
        for place in self.memory:
            bar, instant = place.worst
            if self.room(place) < 0:
                what = f"{'+'.join(place.place.roles)}: {bar.name}, {instant.name}"
                lines.append(f"{what} needs {instant.total / GIB:.1f} GiB by estimate; {name} has {have:.1f}")
        return lines

    @property
    def fullest(self) -> PlaceMemory:
        return min(self.memory, key=self.room)

    @property
    def dollars(self) -> float | None:
        """For 1,000 driver steps; None: no price is known."""
        if self.price is None:
            return None
        return 1000 * self.pace.seconds / 3600 * self.jobs.num_devices * self.price


def estimate(jobs: Jobs, device: Device, *, price: float = 0.0) -> Estimate:
    """The cost of jobs. ``price``: dollars for an hour of one device; 0: what the file of the device says."""
    stages = stages_of(jobs, device)
    return Estimate(
        jobs=jobs,
        device=device,
        memory=memory_of(jobs, device),
        stages=stages,
        pace=pace(jobs, stages, lookahead=jobs.lookahead, streams=jobs.chunks > 1, cores=device.cores),
        price=price or device.price,
    )


def estimate_of(config: RunConfig, device: Device) -> Estimate:
    """The cost of a recipe that was checked."""
    return estimate(jobs_of(config), device, price=config.plan.price)


_ONE_WAY = "one stage after the other"


def paces(found: Estimate) -> dict[str, Pace]:
    """The same stages, one after the other, ahead of each other, and in chunks; by name, the recipe's own among them.

    Roles that take turns, one process and a file have one way.
    """
    jobs, stages = found.jobs, found.stages
    if own_way(jobs) == _ONE_WAY:
        return {_ONE_WAY: found.pace}
    ways = sorted({(0, False), (0, True), (1, False), (1, True), (jobs.lookahead, jobs.chunks > 1)})
    streamed, cores = replace(jobs, chunks=max(jobs.chunks, CHUNKS)), found.device.cores
    return {
        _way(ahead, chunks): pace(streamed, stages, lookahead=ahead, streams=chunks, cores=cores)
        for ahead, chunks in ways
    }


def own_way(jobs: Jobs) -> str:
    """The name of the recipe's way."""
    if jobs.takes_turns or jobs.local or jobs.engine is None:
        return _ONE_WAY
    return _way(jobs.lookahead, jobs.chunks > 1)


def _way(lookahead: int, streams: bool) -> str:
    return f"lookahead {lookahead}" + (", streaming" if streams else "")


def named_device(config: RunConfig) -> Device | None:
    """The device that ``plan.devices`` names, else that of ``plan.device``.

    Raises:
        ConfigError: there is no such device.
    """
    plan = config.plan
    if plan.devices is not None and plan.devices != CLUSTER:
        return Device.load(split_devices(plan.devices)[1])
    return Device.load(plan.device) if plan.device is not None else None


def device_of(config: RunConfig) -> tuple[Device, str]:
    """The device that a recipe is planned for, and a sentence if it is another one than the recipe names; else empty.

    Raises:
        ConfigError: there is no such device.
    """
    wanted = None if config.training.device == "auto" else config.training.device
    named = named_device(config)
    if named is None:
        return Device.load(DEFAULTS[wanted or find_device()]), ""
    if wanted is None or named.kind == wanted:
        return named, ""
    other = Device.load(DEFAULTS[wanted])
    return other, f"plan.device = {named.name} is no {wanted}; planned for training.device = {wanted}: {other.name}"
