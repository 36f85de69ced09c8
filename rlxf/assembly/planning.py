"""What a dry run says of memory, time and better layouts. Torch is imported only to measure a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.config.placement import resource_name
from rlxf.config.plan import CLUSTER, split_devices
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError, OutOfMemoryPlan
from rlxf.planner.device import DEFAULTS, Device
from rlxf.planner.estimate import Estimate, device_of, estimate_of, named_device
from rlxf.planner.names import fitting_device
from rlxf.planner.recipe import write_recipe
from rlxf.planner.search import search
from rlxf.planner.text import memory_table, out_of_memory, search_table, time_table
from rlxf.planner.ways_out import ways_out

if TYPE_CHECKING:
    from rlxf.platform.base import Platform

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The recipe that is planned, as it was named and typed."""

    name: str = ""
    typed: Mapping[str, Any] = field(default_factory=dict)  # ``section.key`` -> value of the command line


def planned_device(config: RunConfig) -> tuple[Device, str]:
    """The device that the recipe is planned for, measured if it is this CPU; and a note about it, or nothing.

    Raises:
        ConfigError: the recipe names an unknown one.
    """
    device, note = device_of(config)
    return measured(device, config), note


def for_its_device(config: RunConfig) -> RunConfig:
    """A recipe that leaves its device open and names one to plan for: the recipe for that kind of device."""
    device = named_device(config)
    if device is None or config.training.device != "auto":
        return config
    training = config.training.model_copy(update={"device": device.kind})
    return config.model_copy(update={"training": training})


def measured(device: Device, config: RunConfig) -> Device:
    """A CPU with the figures of this machine where its file has none; other devices as they are."""
    if not device.lacks_figures:
        return device
    from rlxf.platform.probe import num_cores, probe_cpu

    return device.with_probe(probe_cpu(config.training.cpu_linear)).with_cores(num_cores())


def run_device(config: RunConfig, platform: Platform) -> tuple[Device, bool]:
    """The figures of this run's devices, and whether they are of these very devices, so that there is an MFU.

    ``plan.device`` if it is of the run's kind, else the file that fits the device's name, else that of most devices of
    the kind. Figures of a CPU that its file leaves open are measured.
    """
    kind, named = platform.name, config.plan.device
    if named is not None:
        device = Device.load(named)
        if device.kind == kind:
            return measured(device, config), True
        log.info("plan.device = %s is of another kind than this run's devices (%s) and not used", named, kind)
    fitting = fitting_device(kind, platform.device_name())
    if fitting is not None:
        return fitting, True
    device = Device.load(DEFAULTS[kind])
    return measured(device, config), device.is_cpu


def plan_costs(config: RunConfig, say: Callable[[str], None], *, color: bool = False) -> Estimate:
    """Print the tables of the recipe's memory and time; the estimate.

    Raises:
        ConfigError: the recipe names an unknown device.
    """
    device, note = planned_device(config)
    found = estimate_of(config, device)
    say("\n" + (f"{note}\n" if note else "") + memory_table(found, color=color))
    say("\n" + time_table(found))
    return found


def require_memory(config: RunConfig, found: Estimate) -> None:
    """That the estimate fits.

    Raises:
        OutOfMemoryPlan: it does not; the message names the worst instants and what to type.
    """
    if not found.fits:
        raise OutOfMemoryPlan("\n".join(out_of_memory(found, ways_out(config, found))))


def plan_layouts(config: RunConfig, nodes: Sequence[int], recipe: Recipe, say: Callable[[str], None]) -> None:
    """Search the layouts that ``plan.devices`` asks for, print the best ones, and write the first if it is wanted.

    ``nodes``: devices of each node of the running cluster.

    Raises:
        ConfigError: there is no such device, no cluster, or the file of ``plan.write`` cannot be written.
        OutOfMemoryPlan: a recipe is to be written, and no layout fits.
    """
    assert config.plan.devices is not None
    count, device = _devices(config, nodes)
    chosen = estimate_of(config, device)
    found = search(config, device, count)
    say("\n" + search_table(found, chosen, count))
    if config.plan.write is None:
        return
    if not found:
        raise OutOfMemoryPlan(f"plan.write = {config.plan.write}: nothing is written, because no layout fits")
    path = Path(config.plan.write)
    write_recipe(path, recipe.name, recipe.typed, found[0])
    say(f"\nwritten: {path}; train with --config-dir {path.parent} --config-name {path.stem}\n")


def _devices(config: RunConfig, nodes: Sequence[int]) -> tuple[int, Device]:
    wanted = config.plan.devices
    assert wanted is not None
    if wanted != CLUSTER:
        count, name = split_devices(wanted)
        device = Device.load(name)
        return count, measured(device, config)
    if not sum(nodes):
        where = "no node of it has" if nodes else "no cluster is running here, which would have"
        asked = f"{where} {resource_name(config)}; name a number such as plan.devices=16x910b-64"
        raise ConfigError(f'plan.devices = "cluster": {asked}')
    device, _ = planned_device(config)
    return sum(nodes), device if device.is_cpu else device.with_cores(max(nodes))
