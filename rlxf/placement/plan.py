"""The placement plan of a recipe against a cluster's nodes. Pure: neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlxf.config.placement import GroupPlan, Plan, RolePlan, make_plan, resource_name
from rlxf.config.schema import ResourcePoolConfig

__all__ = ["GroupPlan", "NodeResources", "Plan", "RolePlan", "assign", "crowded", "fit", "make_plan", "resource_name"]

ACTOR_GROUP = "actor_rollout"  # the devices that train, and those that sample
PROCESSES_PER_CORE = 8  # of a CPU machine without accelerator: more of them only wait for each other


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResources:
    """One node of a running cluster."""

    name: str  # address or host name, as a person knows it
    total: Mapping[str, float] = field(default_factory=dict)  # Ray resource name -> amount
    free: Mapping[str, float] = field(default_factory=dict)


def assign(plan: Plan, nodes: Sequence[NodeResources]) -> dict[tuple[str, int], str] | None:
    """Which node each entry of each group goes to, ``(group, index) -> node name``; None when they do not all fit.

    Exact: if there is any way to place the entries, one is found, and of all ways one in which training and sampling
    are on the fewest nodes, because the weights travel between them after every update.
    """
    entries = [(size, group.name, i) for group in plan.groups for i, size in enumerate(group.nodes)]
    entries.sort(key=lambda entry: -entry[0])
    free = [int(node.free.get(plan.resource, 0)) for node in nodes]
    chosen = _search([size for size, _, _ in entries], free)
    if chosen is None:
        return None
    num_used = len({node for node, (_, name, _) in zip(chosen, entries, strict=True) if name == ACTOR_GROUP})
    first = sorted(entries, key=lambda entry: entry[1] != ACTOR_GROUP)  # each part stays sorted by size
    num_first = sum(name == ACTOR_GROUP for _, name, _ in entries)
    for most in range(1, num_used):
        fewer = _search([size for size, _, _ in first], free, num_first, most)
        if fewer is not None:
            entries, chosen = first, fewer
            break
    return {(name, i): nodes[node].name for (_, name, i), node in zip(entries, chosen, strict=True)}


def _search(sizes: Sequence[int], free: Sequence[int], num_first: int = 0, most: int = 0) -> list[int] | None:
    """The node of each entry, by its index; the first ``num_first`` entries on at most ``most`` nodes.

    ``sizes`` of these entries, and of the others, should fall: then a hopeless search ends early.
    """
    left, used = list(free), [False] * len(free)
    dead: set[tuple[int, tuple[tuple[int, bool], ...]]] = set()

    def hopeless(index: int) -> bool:
        """Whether the rest of the first entries exceeds what ``most`` nodes have, each of them filled up."""
        new = sorted((left[n] for n in range(len(left)) if not used[n]), reverse=True)[: most - sum(used)]
        return sum(sizes[index:num_first]) > sum(new) + sum(left[n] for n in range(len(left)) if used[n])

    def place(index: int) -> list[int] | None:
        if index == len(sizes):
            return []
        limited = index < num_first
        # The rest of the entries needs no more of the past than the room of each node, and whether it may be used.
        state = (index, tuple(sorted((room, limited and mark) for room, mark in zip(left, used, strict=True))))
        if state in dead or (limited and hopeless(index)):
            return None
        tried: set[tuple[int, bool]] = set()
        for node in sorted(range(len(left)), key=lambda n: left[n]):  # the tightest fit first keeps large gaps open
            same, before = (left[node], limited and used[node]), used[node]
            if left[node] < sizes[index] or same in tried or (limited and not before and sum(used) == most):
                continue
            tried.add(same)
            left[node], used[node] = left[node] - sizes[index], before or limited
            rest = place(index + 1)
            left[node], used[node] = left[node] + sizes[index], before
            if rest is not None:
                return [node, *rest]
        dead.add(state)
        return None

    return place(0)


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
