"""The placement plan of a recipe against a cluster's nodes. Pure: neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlxf.config.placement import GroupPlan, Plan, RolePlan, make_plan, resource_name
from rlxf.config.schema import ResourcePoolConfig

__all__ = ["GroupPlan", "NodeResources", "Plan", "RolePlan", "assign", "crowded", "fit", "make_plan", "resource_name"]

PROCESSES_PER_CORE = 8  # of a CPU machine without accelerator: more of them only wait for each other


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


def crowded(pools: ResourcePoolConfig, plan: Plan, cores: int) -> str | None:
    """Why this machine's CPUs should not run all of a plan's processes; None when they are few enough.

    Only for a Ray that the run starts by itself on CPUs: there the number of devices is a free choice. A running
    cluster reports its own resources.
    """
    counts = {"actor_rollout": 0, "ref": 0, "reward": 0}
    for role in plan.roles:
        processes = len(role.bundles) // (role.axes["TP"] if role.role == "infer" else 1)  # an engine is one process
        counts[role.role if role.role in counts else "actor_rollout"] += processes
    total, most = sum(counts.values()), PROCESSES_PER_CORE * cores
    if total <= most:
        return None
    largest = max(counts, key=lambda name: counts[name])
    asked = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return (
        f"resource_pool.{largest} = {list(getattr(pools, largest))}: the recipe asks for {total} worker "
        f"processes ({asked}); this machine has {cores} cores and no accelerator: expected at most {most} processes, "
        f"{PROCESSES_PER_CORE} a core. Make the pool smaller, for example "
        f"resource_pool.{largest}={2 if largest == 'actor_rollout' else 1}, or start a Ray cluster of more machines "
        "first (dry_run=true prints the commands)"
    )
