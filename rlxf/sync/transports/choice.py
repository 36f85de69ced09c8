"""Which transport a run gets: the best one that devices and placement allow, or the one that the recipe names. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlxf.config.kinds import TransportName
from rlxf.core.errors import ConfigError
from rlxf.platform.base import Platform


@dataclass(frozen=True, slots=True)
class Where:
    """Where a process is, as far as weights are concerned."""

    machine: str  # ``this_machine``
    device: str | None = None  # a name that processes of this machine agree on; None: not known, or a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the ends of a transport are."""

    actor: tuple[Where, ...]  # every rank
    engines: tuple[Where, ...]  # every process of every engine


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why it is this one."""

    name: TransportName
    why: str


_ON_A_CPU: tuple[TransportName, ...] = ("shared_memory", "collective", "object_store")
_ON_DEVICES: tuple[TransportName, ...] = ("ipc", "collective", "shared_memory", "object_store")


def choose(wanted: TransportName, platform: Platform, places: Places) -> Choice:
    """What ``sync.transport`` means for processes in these places.

    Raises:
        ConfigError: the recipe names a transport that cannot work there.
    """
    if wanted != "auto":
        problem = _problem(wanted, platform, places)
        if problem is not None:
            raise ConfigError(
                f"sync.transport = {wanted}: {problem}; set sync.transport=auto, which would be "
                f"{choose('auto', platform, places).name} here"
            )
        return Choice(wanted, "sync.transport says so")
    order = _ON_A_CPU if platform.weights_in_host_memory else _ON_DEVICES
    name = next(name for name in order if _problem(name, platform, places) is None)
    others = list(_refused(order[: order.index(name)], platform, places))
    return Choice(name, "; ".join([_REASONS[name], *others]))


_REASONS: dict[TransportName, str] = {
    "ipc": "every engine is on a device of the actor",
    "collective": "actor and engines are on different devices or machines",
    "shared_memory": "actor and engines are on one machine",
    "object_store": "nothing faster works",
}


def _refused(names: Sequence[TransportName], platform: Platform, places: Places) -> Iterator[str]:
    for name in names:
        yield f"not {name}: {_problem(name, platform, places)}"


def _problem(name: TransportName, platform: Platform, places: Places) -> str | None:
    """Why a transport cannot work; None: it can."""
    if name == "shared_memory":
        apart = len({place.machine for place in (*places.actor, *places.engines)}) > 1
        return "actor and engines are on several machines" if apart else None
    if name == "ipc":
        return _no_ipc(platform, places)
    if name == "collective" and not platform.weights_in_host_memory:
        return _no_collective(places)
    return None


def _no_ipc(platform: Platform, places: Places) -> str | None:
    if not platform.links.shares_devices:
        return f"a {platform.name} has no memory of its own that processes could share by handles"
    if _unknown(places):
        return "it is not known which devices the processes have"
    alone = [place.device for place in places.engines if place not in places.actor]
    return f"an engine is on device {alone[0]}, where no rank of the actor is" if alone else None


def _no_collective(places: Places) -> str | None:
    if _unknown(places):
        return "it is not known which devices the processes have"
    shared = [place.device for place in places.engines if place == places.actor[0]]
    if shared:
        return f"an engine is on device {shared[0]}, where the actor's rank 0 is, and a group has one member per device"
    twice = {place for place in places.engines if places.engines.count(place) > 1}
    return "two engines share a device, and a group has one member per device" if twice else None


def _unknown(places: Places) -> bool:
    return any(place.device is None for place in (*places.actor, *places.engines))
