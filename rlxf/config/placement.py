"""Where each role of a recipe runs: which devices of which pool. Pure: neither Ray nor torch.

A *group* is one Ray placement group: processes per node, one bundle per device. A *role* (train, infer, ref, reward)
takes some bundles of one group; colocated roles take the same ones. ``make_plan`` is the only place that decides this,
so a dry run, the check against a cluster and the launcher cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rlxf.config.devices import device_facts
from rlxf.config.kinds import Role
from rlxf.config.roles import RoleConfig
from rlxf.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """Devices that are claimed together. ``nodes[i]`` of them are on one node; two entries may share a node."""

    name: str
    nodes: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        return sum(self.nodes)

    def node_of(self, bundle: int) -> int:
        """Which entry of ``nodes`` a bundle belongs to; bundles are numbered node after node."""
        for index, count in enumerate(self.nodes):
            if bundle < count:
                return index
            bundle -= count
        raise IndexError(f"{self.name} has {self.num_devices} bundles")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolePlan:
    """The processes of one role: process ``i`` runs on bundle ``bundles[i]`` of its group."""

    role: Role
    group: str
    bundles: tuple[int, ...]
    model: str
    axes: Mapping[str, int]  # parallel sizes within one copy of the model, by their usual letters


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole placement. With ``runtime=local`` it holds what the recipe would claim on Ray."""

    resource: str  # Ray's name of one device
    groups: tuple[GroupPlan, ...]
    roles: tuple[RolePlan, ...]

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    def group(self, name: str) -> GroupPlan:
        return next(group for group in self.groups if group.name == name)

    def role(self, name: Role) -> RolePlan | None:
        """The plan of a role; None when this run does not have it."""
        return next((role for role in self.roles if role.role == name), None)


def resource_name(config: RunConfig) -> str:
    """Ray's name of one device of this run."""
    return config.resource_pool.resource_name or device_facts(config.training.device).ray_resource


def make_plan(config: RunConfig) -> Plan:
    """The placement of a recipe that was checked."""
    groups, bundles, _ = _place(config)
    actor = config.actor_rollout
    axes: dict[Role, dict[str, int]] = {
        "train": _axes(actor),
        "infer": {"TP": actor.inference_tensor_model_parallel_size},
        "ref": _axes(config.ref),
        "reward": _axes(config.reward),
    }
    models: dict[Role, str] = {"train": actor.model, "infer": actor.model, "ref": config.ref.model}
    models["reward"] = config.reward.model or actor.model
    roles = tuple(
        RolePlan(role=role, group=name, bundles=taken, model=models[role], axes=axes[role])
        for role, (name, taken) in bundles.items()
    )
    return Plan(resource=resource_name(config), groups=tuple(groups.values()), roles=roles)


def _axes(role: RoleConfig) -> dict[str, int]:
    sizes = role.tensor_model_parallel_size, role.pipeline_model_parallel_size, role.context_parallel_size
    return dict(zip(("TP", "PP", "CP"), sizes, strict=True))


def placement_problems(config: RunConfig) -> list[tuple[str, str]]:
    """What cannot be placed: the key, and ``key = value: what is expected``. The pool sizes must fit already."""
    groups, bundles, problems = _place(config)
    size = config.actor_rollout.inference_tensor_model_parallel_size
    if "infer" not in bundles or size == 1:
        return problems
    key = "actor_rollout.inference_tensor_model_parallel_size"
    name, devices = bundles["infer"]
    engines = [devices[i : i + size] for i in range(0, len(devices), size)]
    if any(len({groups[name].node_of(device) for device in engine}) > 1 for engine in engines):
        pool = list(config.resource_pool.actor_rollout)
        expected = (
            f"one engine would span two nodes of resource_pool.actor_rollout = {pool}; make its entries multiples of it"
        )
        problems.append((key, f"{key} = {size}: {expected}"))
    return problems


_Groups = dict[str, GroupPlan]
_Bundles = dict[Role, tuple[str, tuple[int, ...]]]  # role -> its group's name and its bundles there

_Problems = list[tuple[str, str]]
_ACTOR_ROLES: tuple[Role, ...] = ("train", "infer")


def _place(config: RunConfig) -> tuple[_Groups, _Bundles, _Problems]:
    groups, bundles = _place_actor(config)
    problems = _place_frozen(config, groups, bundles)
    return groups, bundles, problems


def _place_actor(config: RunConfig) -> tuple[_Groups, _Bundles]:
    """Training takes the first devices of its pool, rollout the next ones, or the same ones when both are colocated."""
    actor = config.actor_rollout
    num_infer = actor.num_gpus_for_infer if config.samples else 0
    first = 0 if {"train", "infer"} <= config.sharing else actor.num_gpus_for_train
    last = max(actor.num_gpus_for_train, first + num_infer)
    group = GroupPlan(name="actor_rollout", nodes=_first(config.resource_pool.actor_rollout, last))
    bundles: _Bundles = {"train": (group.name, tuple(range(actor.num_gpus_for_train)))}
    if config.samples:
        bundles["infer"] = (group.name, tuple(range(first, first + num_infer)))
    return {group.name: group}, bundles


def _first(nodes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The first ``count`` devices of a pool. The others are not claimed: an offline run has no device that samples."""
    kept = []
    for size in nodes:
        kept.append(min(size, count))
        count -= kept[-1]
    return tuple(size for size in kept if size > 0)


def _place_frozen(config: RunConfig, groups: _Groups, bundles: _Bundles) -> _Problems:
    """Reference and reward model: on devices of their own, or on those of the roles that they are colocated with."""
    pool, shared = config.resource_pool, config.sharing
    wanted: dict[Role, tuple[int, ...]] = {"ref": pool.ref} if config.loads_reference else {}
    if config.scores:
        wanted["reward"] = pool.reward
    hosts = [role for role in _ACTOR_ROLES if role in shared]
    if {"ref", "reward"} <= shared and not hosts:
        larger = tuple(max(sizes) for sizes in zip_longest(pool.ref, pool.reward, fillvalue=0))
        groups["ref+reward"] = GroupPlan(name="ref+reward", nodes=larger)
    problems = []
    for role, nodes in wanted.items():
        name = "actor_rollout" if role in shared and hosts else "ref+reward" if role in shared else role
        group = groups.setdefault(name, GroupPlan(name=name, nodes=nodes))
        theirs = {bundle for host in hosts for bundle in bundles[host][1]} if role in shared else set()
        offered = _by_node(group, sorted(theirs or range(group.num_devices)))
        if len(nodes) <= len(offered) and all(n <= len(node) for n, node in zip(nodes, offered, strict=False)):
            bundles[role] = (name, tuple(b for n, node in zip(nodes, offered, strict=False) for b in node[:n]))
            continue
        key, sizes = f"resource_pool.{role}", [len(node) for node in offered]
        expected = f"expected at most {sizes}, the devices of {' and '.join(hosts)}, with which it shares (colocate)"
        problems.append((key, f"{key} = {list(nodes)}: {expected}"))
    return problems


def _by_node(group: GroupPlan, bundles: Sequence[int]) -> list[list[int]]:
    nodes: dict[int, list[int]] = {}
    for bundle in bundles:
        nodes.setdefault(group.node_of(bundle), []).append(bundle)
    return list(nodes.values())
