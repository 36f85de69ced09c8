"""Claiming devices: the plan's groups as Ray placement groups, and the slots that workers start in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlxf.core.errors import PlacementError, StageTimeout
from rlxf.placement.plan import GroupPlan, NodeResources, Plan, RolePlan, assign, fit

from .remote import Pending, Waiter

PLACE_S = 10.0  # longest time to claim all devices, seconds
RELEASE_S = 5.0  # of which: how long to wait for devices that a run before this one is giving back


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one worker process starts, and how much of which resource it takes there."""

    group: PlacementGroup
    bundle: int
    resource: str
    amount: float
    node: str

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

    def __init__(self, plan: Plan, waiter: Waiter) -> None:
        """Claim every device of the plan.

        Raises:
            PlacementError: the cluster has no room; asked, has and free per node are in the message.
        """
        self._plan = plan
        self._nodes = _wait_for_room(plan)
        self._groups: dict[str, PlacementGroup] = {}
        node_ids = {_name(node): node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for group in plan.groups:
            entries = [self._nodes[group.name, group.node_of(owned[0])] for owned in _bundles(plan, group)]
            self._groups[group.name] = placement_group(
                [{plan.resource: float(len(owned))} for owned in _bundles(plan, group)],
                strategy="PACK",
                bundle_label_selector=[{"ray.io/node-id": node_ids[entry]} for entry in entries],
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
            index = next(i for i, owned in enumerate(bundles) if devices[0] in owned)
            sharing = sum(devices[0] in other.bundles for other in self._plan.roles if other.group == role.group)
            amount = float(len(devices)) if sharing == 1 else int(10_000 / sharing) / 10_000  # Ray counts in 1/10000
            node = self._nodes[group.name, group.node_of(devices[0])]
            slots.append(Slot(self._groups[group.name], index, self._plan.resource, amount, node))
        return slots

    def release(self) -> None:
        for group in self._groups.values():
            remove_placement_group(group)


def _process_devices(role: RolePlan) -> list[tuple[int, ...]]:
    """The devices of each process. A rollout engine is one process that owns all its tensor-parallel devices."""
    size = role.axes["TP"] if role.role == "infer" else 1
    return [role.bundles[i : i + size] for i in range(0, len(role.bundles), size)]


def _bundles(plan: Plan, group: GroupPlan) -> list[tuple[int, ...]]:
    """The devices of each Ray bundle: one, but a rollout engine's devices are one bundle: one process takes all."""
    owners: dict[int, tuple[int, ...]] = {device: (device,) for device in range(group.num_devices)}
    for role in plan.roles:
        if role.group != group.name:
            continue
        for devices in _process_devices(role):
            owners.update({device: devices for device in devices if len(devices) > 1})
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
