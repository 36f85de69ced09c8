"""The placement plan of a recipe against a cluster's nodes. Pure: neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlxf.config.placement import GroupPlan, Plan, RolePlan, make_plan, resource_name

__all__ = ["GroupPlan", "NodeResources", "Plan", "RolePlan", "assign", "fit", "make_plan", "resource_name"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResources:
    """One node of a running cluster."""

    name: str  # address or host name, as a person knows it
    total: Mapping[str, float] = field(default_factory=dict)  # Ray resource name -> amount
    free: Mapping[str, float] = field(default_factory=dict)


def assign(plan: Plan, nodes: Sequence[NodeResources]) -> dict[tuple[str, int], str] | None:
    """Which node each entry of each group goes to, ``(group, index) -> node name``; None when they do not all fit.

    Exact: if there is any way to place the entries, one is found.
    """
    entries = [(size, group.name, i) for group in plan.groups for i, size in enumerate(group.nodes)]
    entries.sort(key=lambda entry: -entry[0])
    free = [int(node.free.get(plan.resource, 0)) for node in nodes]
    dead: set[tuple[int, tuple[int, ...]]] = set()

    def place(index: int) -> list[int] | None:
        state = (index, tuple(sorted(free)))
        if index == len(entries):
            return []
        if state in dead:
            return None
        for node in sorted(range(len(free)), key=lambda n: free[n]):  # the tightest fit first keeps large gaps open
            if free[node] >= entries[index][0]:
                free[node] -= entries[index][0]
                rest = place(index + 1)
                free[node] += entries[index][0]
                if rest is not None:
                    return [node, *rest]
        dead.add(state)
        return None

    chosen = place(0)
    if chosen is None:
        return None
    return {(name, i): nodes[node].name for (_, name, i), node in zip(entries, chosen, strict=True)}


def fit(plan: Plan, nodes: Sequence[NodeResources]) -> list[str]:
    """Why a cluster cannot hold a plan: what it asks for, has and has free, node by node. Empty when it fits."""
    if assign(plan, nodes) is not None:
        return []
    resource = plan.resource
    total = sum(int(node.total.get(resource, 0)) for node in nodes)
    free = sum(int(node.free.get(resource, 0)) for node in nodes)
    pools = ", ".join(f"{group.name} {list(group.nodes)}" for group in plan.groups)
    lines = [
        f"the cluster cannot hold this recipe: asked {plan.num_devices} {resource} ({pools}), has {total}, free {free}"
    ]
    lines += [
        f"  node {node.name}: has {node.total.get(resource, 0):g} {resource}, free {node.free.get(resource, 0):g}"
        for node in nodes
    ]
    return [*lines, _advice(plan, total, free)]


def _advice(plan: Plan, total: int, free: int) -> str:
    if total == 0:
        return (
            f"  no node declares {plan.resource}: give it to `ray start`, or name the resource that the cluster has in "
            "resource_pool.resource_name"
        )
    if total < plan.num_devices:
        return (
            "  add nodes, or make the pools smaller: resource_pool.<role>, or resource_pool.colocate to share devices"
        )
    if free < plan.num_devices:
        return "  other jobs hold the rest: wait for them, or stop them (`ray status` lists what is in use)"
    return "  enough in all, but an entry of a pool must fit on one node; split it, such as [4, 4] for [8]"
