"""Claiming devices: the plan's groups as Ray placement groups, and the slots that workers start in.

If a node is lost, its slots are claimed anew where there is room, in placement groups of their own.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlxf.core.errors import PlacementError, RunInterrupted, StageTimeout
from rlxf.core.events import event
from rlxf.placement.plan import GroupPlan, NodeResources, Plan, RolePlan, assign, fit

from .remote import Pending, Waiter

log = logging.getLogger(__name__)

PLACE_S = 10.0  # longest time to claim all devices, seconds
ANSWER_S = 2.0  # longest wait for a node to take a connection
RELEASE_S = 5.0  # of which: how long to wait for devices that a run before this one is giving back
_Place = tuple[str, int]  # a group, by its id, and a bundle of it
_INSTEAD = "start a node in its place, or raise resilience.node_wait_s"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one worker process starts, and how much of which resource it takes there."""

    group: PlacementGroup
    bundle: int
    resource: str
    amount: float
    node: str
    others: tuple[int, ...] = ()  # further bundles of the group whose devices are the process's, too, with other roles

    @property
    def place(self) -> _Place:
        """The bundle, which other slots may share."""
        return self.group.id.hex(), self.bundle

    def options(self) -> dict[str, Any]:
        """Options of the Ray actor that takes this slot."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundle)
        resources: dict[str, Any] = {"num_cpus": 0}
        if self.resource == "CPU":
            resources = {"num_cpus": self.amount}
        elif self.resource == "GPU":
            resources["num_gpus"] = self.amount
        else:
            resources["resources"] = {self.resource: self.amount}
        return {"scheduling_strategy": strategy, **resources}


def cluster_nodes() -> list[NodeResources]:
    """The living nodes of the cluster that this process is connected to."""
    free = available_resources_per_node()
    return [
        NodeResources(name=_name(node), total=node["Resources"], free=free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def node_ids() -> dict[str, str]:
    """Ray's id of each living node, by the name that the run gives it."""
    return {_name(node): node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"  # two raylets of one machine share the address


class Pools:
    """The claimed devices of one run. A group is one placement group whose bundles are pinned to the planned nodes."""

    def __init__(self, plan: Plan, waiter: Waiter, *, node_wait_s: float = 0.0) -> None:
        """Claim every device of the plan.

        Args:
            plan: who gets which device.
            waiter: waits for them.
            node_wait_s: how long to wait for devices in place of those of a lost node.

        Raises:
            PlacementError: the cluster has no room; asked, has and free per node are in the message.
        """
        self._plan = plan
        self._waiter = waiter
        self._node_wait_s = node_wait_s
        self._moved: dict[_Place, tuple[PlacementGroup, int, str]] = {}  # bundles of lost nodes
        self._sizes: dict[_Place, float] = {}  # devices of each bundle
        self._units: dict[_Place, tuple[_Place, ...]] = {}  # bundles of one process, which must stay on one node
        self._nodes = _wait_for_room(plan)
        self._groups: dict[str, PlacementGroup] = {}
        ids = node_ids()
        for group in plan.groups:
            entries = [self._nodes[group.name, group.node_of(owned[0])] for owned in _bundles(plan, group)]
            self._groups[group.name] = placement_group(
                [{plan.resource: float(len(owned))} for owned in _bundles(plan, group)],
                strategy="PACK",
                bundle_label_selector=[{"ray.io/node-id": ids[entry]} for entry in entries],
            )
        pending = [Pending(pg.ready(), f"pool {name}", "placement") for name, pg in self._groups.items()]
        try:
            waiter.gather(pending, PLACE_S - RELEASE_S)
        except StageTimeout as error:
            self.release()
            table = fit(plan, cluster_nodes()) or ["another job took the devices at this moment; try again"]
            raise PlacementError("\n".join(table)) from error

    def slots(self, role: RolePlan) -> list[Slot]:
        """One slot per process of a role, in rank order."""
        group = self._plan.group(role.group)
        bundles = _bundles(self._plan, group)
        slots = []
        for devices in _process_devices(role):
            index, *others = dict.fromkeys(
                next(i for i, owned in enumerate(bundles) if device in owned) for device in devices
            )
            sharing = sum(devices[0] in other.bundles for other in self._plan.roles if other.group == role.group)
            size = float(len(bundles[index]))
            amount = size if sharing == 1 else int(10_000 / sharing) / 10_000  # Ray counts in 1/10000
            node = self._nodes[group.name, group.node_of(devices[0])]
            slot = Slot(self._groups[group.name], index, self._plan.resource, amount, node, tuple(others))
            self._note(slot, size)
            slots.append(slot)
        return slots

    def _note(self, slot: Slot, size: float) -> None:
        """How large the bundles of a slot are, each like the first, and that they stay together."""
        unit = tuple((slot.place[0], bundle) for bundle in (slot.bundle, *slot.others))
        self._sizes.update(dict.fromkeys(unit, size))
        if slot.others:
            self._units.update(dict.fromkeys(unit, unit))

    def living(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots, with another in place of each whose node is lost; waits for room, also on a node that joins.

        Raises:
            RunInterrupted: there was none in time.
        """
        alive = answering_nodes()
        known = [self._moved_to(slot) for slot in slots]
        lost = [slot for slot in known if slot.node not in alive]
        if lost:
            self._claim(lost)
        return [self._moved_to(slot) for slot in known]

    def _moved_to(self, slot: Slot) -> Slot:
        """The slot where it is now: its node may have been lost, more than once."""
        while slot.place in self._moved:
            group, bundle, node = self._moved[slot.place]
            others = tuple(self._moved[slot.place[0], other][1] for other in slot.others)
            slot = replace(slot, group=group, bundle=bundle, node=node, others=others)
        return slot

    def _claim(self, lost: Sequence[Slot]) -> None:
        """Other devices for the bundles of these slots."""
        units = list(dict.fromkeys(self._units.get(slot.place, (slot.place,)) for slot in lost))
        sizes, resource = [sum(self._sizes[place] for place in unit) for unit in units], self._plan.resource
        dead = ", ".join(sorted({slot.node for slot in lost}))
        deadline, group = time.monotonic() + self._node_wait_s, None
        while group is None:
            problem, found = self._wait_for_nodes(sizes, dead, deadline)
            nodes = {place: node for unit, node in zip(units, found, strict=True) for place in unit}
            group = self._try_to_claim([{resource: self._sizes[place]} for place in nodes], list(nodes.values()))
            if group is None and time.monotonic() > deadline:
                raise RunInterrupted(f"{problem}, which another job took at this moment; {_INSTEAD}")
        self._groups[f"in place of node {dead}, {len(self._moved)}"] = group
        names = {node["NodeID"]: _name(node) for node in ray.nodes()}
        new = {place: (group.id.hex(), bundle) for bundle, place in enumerate(nodes)}
        for place, node in nodes.items():
            self._moved[place] = group, new[place][1], names[node]
            self._sizes[new[place]] = self._sizes[place]
            if place in self._units:
                self._units[new[place]] = tuple(new[other] for other in self._units[place])

    def _try_to_claim(self, bundles: list[dict[str, float]], places: Sequence[str]) -> PlacementGroup | None:
        """A group of these bundles, each on the node of that id; None: there was no room for it after all."""
        labels = [{"ray.io/node-id": node_id} for node_id in places]
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=labels)
        try:
            self._waiter.gather([Pending(group.ready(), "the pool of a lost node", "placement")], PLACE_S)
        except Exception as error:
            remove_placement_group(group)  # else it would keep the devices from whoever tries again
            if not isinstance(error, StageTimeout):
                raise
            return None
        return group

    def _wait_for_nodes(self, sizes: Sequence[float], dead: str, deadline: float) -> tuple[str, list[str]]:
        """What is needed and free, for people, and the node of each bundle, by its id; once there is room for all.

        Raises:
            RunInterrupted: there was none before the deadline, seconds of ``time.monotonic``.
        """
        told = False
        while True:
            resource, answering = self._plan.resource, answering_nodes()
            nodes = {answering[node.name]: node for node in cluster_nodes() if node.name in answering}
            left = {node_id: node.free.get(resource, 0.0) for node_id, node in nodes.items()}
            free = sum(left.values())
            problem = f"need {sum(sizes):g} {resource}, have {free:g} after node {dead} died"
            found = _fit(sizes, left)
            if found is not None:
                return problem, found
            if time.monotonic() > deadline:
                raise RunInterrupted(
                    f"{problem}, and resilience.node_wait_s = {self._node_wait_s:g} s are over; {_INSTEAD}"
                )
            if not told:
                told = True
                text = "%s; waiting up to %g s for devices (resilience.node_wait_s)"
                log.warning(text, problem, self._node_wait_s, extra=event("node lost", who=f"node {dead}"))
            self._waiter.rest(1.0)

    def release(self) -> None:
        for group in self._groups.values():
            remove_placement_group(group)


def answering_nodes() -> dict[str, str]:
    """Ray's id of each node whose raylet can be reached, by name.

    Ray itself counts a node whose raylet has died as alive until it has missed several health checks.
    """
    return {_name(node): node["NodeID"] for node in ray.nodes() if node["Alive"] and _answers(node)}


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def _fit(sizes: Sequence[float], free: Mapping[str, float]) -> list[str] | None:
    """The node of each bundle, the largest first on the fullest node with room; None: they do not fit."""
    left, found = dict(free), [""] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        room = [node for node, amount in left.items() if amount >= sizes[index]]
        if not room:
            return None
        found[index] = min(room, key=lambda node: left[node])
        left[found[index]] -= sizes[index]
    return found


def _process_devices(role: RolePlan) -> list[tuple[int, ...]]:
    """The devices of each process. A rollout engine is one process that owns all its tensor-parallel devices."""
    size = role.axes["TP"] if role.role == "infer" else 1
    return [role.bundles[i : i + size] for i in range(0, len(role.bundles), size)]


def _bundles(plan: Plan, group: GroupPlan) -> list[tuple[int, ...]]:
    """The devices of each Ray bundle: one, or all of a rollout engine's if no other role has a part of them.

    Ray cannot give a process a share of each of several devices. So a device that is shared is a bundle of its own,
    and an engine of several of them takes its share of the first and is told of the others (``devices.py``).
    """
    owners: dict[int, tuple[int, ...]] = {device: (device,) for device in range(group.num_devices)}
    roles = [role for role in plan.roles if role.group == group.name]
    for role in roles:
        for devices in _process_devices(role):
            others = {device for other in roles if other is not role for device in other.bundles}
            if len(devices) > 1 and others.isdisjoint(devices):
                owners.update(dict.fromkeys(devices, devices))
    return sorted(set(owners.values()))


def _wait_for_room(plan: Plan) -> dict[tuple[str, int], str]:
    """Which node each entry of each group goes to; waits a moment for devices that are about to be free."""
    deadline = time.monotonic() + RELEASE_S
    while True:
        nodes = cluster_nodes()
        found = assign(plan, nodes)
        if found is not None:
            return found
        hopeless = assign(plan, [NodeResources(name=n.name, total=n.total, free=n.total) for n in nodes]) is None
        if hopeless or time.monotonic() > deadline:
            raise PlacementError("\n".join(fit(plan, nodes)))
        time.sleep(0.25)
