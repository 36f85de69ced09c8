"""The layouts of a recipe that are fastest on a number of devices, by estimate.

Roles are grouped into pools, the devices are shared out among the pools, and each pool takes the fastest layouts of its
roles that fit its memory. What is found becomes a recipe again, passes the checks of recipes, and is estimated as every
recipe is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlxf.config.kinds import Role
from rlxf.config.placement import make_plan, resource_name
from rlxf.config.schema import RunConfig
from rlxf.placement.plan import NodeResources, assign
from rlxf.planner.device import Device
from rlxf.planner.estimate import CHUNKS, Estimate, estimate_of
from rlxf.planner.jobs import ForwardJob, Layout, jobs_of
from rlxf.planner.options import counts, splits
from rlxf.planner.overrides import changed, different
from rlxf.planner.tables import Pool, Tables
from rlxf.planner.time import Pace, pace, push_of

# Roles that share devices; every other role has devices of its own.
_TOGETHER: tuple[tuple[Role, ...], ...] = (
    (),
    ("ref", "reward"),
    ("train", "ref"),
    ("train", "ref", "reward"),
    ("infer", "ref", "reward"),
    ("train", "infer", "ref", "reward"),
)
_MOST_MADE = 300  # candidates that are made recipes


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A layout, and what it costs."""

    overrides: Mapping[str, Any]  # what to change in the recipe
    config: RunConfig  # with them
    estimate: Estimate
    together: tuple[Role, ...]  # roles that share devices


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    pools: tuple[Pool, ...]
    together: tuple[Role, ...]
    lookahead: int
    streams: bool
    pace: Pace

    @property
    def devices(self) -> int:
        return sum(pool.devices for pool in self.pools)

    @property
    def key(self) -> tuple[Any, ...]:
        """Candidates of the same key are one layout for people."""
        return (self.together, self.lookahead)


def search(config: RunConfig, device: Device, num_devices: int, *, most: int = 5) -> list[Found]:
    """The fastest layouts, fastest first; empty if nothing fits.

    Args:
        config: a recipe that was checked. Its data, batch sizes and losses stay; layouts, colocation, token budget,
            recomputation, lookahead and chunks are free. A twentieth of a device's memory stays free.
        device: of which there are ``num_devices``, in machines of ``device.per_node``.
        num_devices: that may be used; a layout may leave some of them alone.
        most: layouts that are wanted. They differ in what shares devices, or in the lookahead.
    """
    per_node = num_devices if device.is_cpu else device.per_node  # a process of a CPU may be anywhere on it
    tables = Tables(config=config, base=jobs_of(config), device=device, per_node=per_node)
    ranked = sorted(_candidates(tables, num_devices), key=lambda one: (one.pace.seconds, one.devices))
    nodes = _nodes(config, num_devices, per_node)
    found: list[Found] = []
    seen: set[tuple[Any, ...]] = set()
    made = 0
    for candidate in ranked:
        if candidate.key in seen:
            continue
        made += 1
        one = _recipe(tables, candidate, nodes)
        if one is not None:
            seen.add(candidate.key)
            found.append(one)
        if len(found) == most or made == _MOST_MADE:
            break
    return sorted(found, key=lambda one: one.estimate.pace.seconds)


def _nodes(config: RunConfig, num_devices: int, per_node: int) -> list[NodeResources]:
    name, sizes = resource_name(config), splits(num_devices, per_node)
    return [NodeResources(name=f"machine {i}", total={name: n}, free={name: n}) for i, n in enumerate(sizes)]


def _candidates(tables: Tables, num_devices: int) -> Iterator[_Candidate]:
    roles = tuple(tables.base.devices)
    for together in dict.fromkeys(tuple(role for role in group if role in roles) for group in _TOGETHER):
        if len(together) == 1:
            continue
        groups: list[tuple[Role, ...]] = [(role,) for role in roles if role not in together]
        groups += [together] if together else []
        for pools in _shared_out(tables, groups, num_devices):
            yield from _ways(tables, pools, together)


def _shared_out(tables: Tables, groups: Sequence[tuple[Role, ...]], devices: int) -> Iterator[tuple[Pool, ...]]:
    """All ways to share devices out among groups of roles; the last group takes all that is left."""
    group, others = groups[0], groups[1:]
    choices = counts(devices, tables.per_node)
    for count in choices if others else choices[-1:]:
        pool = tables.pool(group, count)
        if pool is None:
            continue
        if not others:
            yield (pool,)
        elif count < devices:
            yield from ((pool, *rest) for rest in _shared_out(tables, others, devices - count))


def _ways(tables: Tables, pools: tuple[Pool, ...], together: tuple[Role, ...]) -> Iterator[_Candidate]:
    """The same pools with and without lookahead, in chunks where they help."""
    base = tables.base
    jobs = tables.jobs(pools)
    stages = {option.stage.name: option.stage for pool in pools for option in pool.options.values()}
    if jobs.engine is not None:
        stages["sync"] = push_of(jobs, tables.device)
    ahead = [0] if jobs.engine is None or jobs.takes_turns else [0, max(base.lookahead, 1)]
    streams = jobs.engine is not None and not jobs.takes_turns and base.work.prompts >= 2 * CHUNKS
    for lookahead in ahead:
        found = tables.jobs(pools, lookahead=lookahead, streams=streams)
        yield _Candidate(
            pools=pools,
            together=together,
            lookahead=lookahead,
            streams=streams,
            pace=pace(found, stages, lookahead=lookahead, streams=streams, cores=tables.device.cores),
        )


def _recipe(tables: Tables, candidate: _Candidate, nodes: Sequence[NodeResources]) -> Found | None:
    """A candidate as a recipe; None if the checks refuse it, it fits no machines, or not the memory after all."""
    config = tables.config
    overrides = different(config, _overrides(tables, candidate))
    made = changed(config, overrides)
    if made is None or assign(make_plan(made), nodes) is None:
        return None
    estimate = estimate_of(made, tables.device)
    if estimate.room(estimate.fullest) < tables.device.memory - tables.room:
        return None
    return Found(overrides=overrides, config=made, estimate=estimate, together=candidate.together)


def _overrides(tables: Tables, candidate: _Candidate) -> dict[str, Any]:
    config, per_node = tables.config, tables.per_node
    jobs = tables.jobs(candidate.pools)
    train, engine = jobs.train, jobs.engine
    keys: dict[str, Any] = {
        "actor_rollout.num_gpus_for_train": train.layout.devices,
        **_layout("actor_rollout", train.layout),
        "actor_rollout.ppo_mini_batch_size": max(train.mini_batch // train.layout.dp, 1),
        "actor_rollout.max_tokens_per_micro_batch": train.largest.tokens,
        "actor_rollout.recompute_granularity": train.recompute,
    }
    num_infer = 0
    if engine is not None:
        num_infer = engine.devices
        keys["actor_rollout.num_gpus_for_infer"] = num_infer
        keys["actor_rollout.inference_tensor_model_parallel_size"] = engine.tp
        keys["rollout.lookahead"] = candidate.lookahead
        chunk = max(jobs.work.prompts // CHUNKS, 1) if candidate.streams else None
        keys["rollout.stream_prompts"] = (config.rollout.stream_prompts or chunk) if candidate.streams else None
        keys["rollout.gpu_memory_utilization"] = None
    first = 0 if jobs.takes_turns else train.layout.devices
    keys["resource_pool.actor_rollout"] = splits(first + num_infer if num_infer else train.layout.devices, per_node)
    hosts = {"train": (0, train.layout.devices), "infer": (first, num_infer)}
    host = next((hosts[role] for role in ("train", "infer") if role in candidate.together), None)
    frozen: list[tuple[Role, ForwardJob | None]] = [("ref", jobs.reference)]
    frozen += [("reward", jobs.rewards[0] if jobs.rewards else None)]
    for role, job in frozen:
        if job is not None:
            keys |= _layout(role, job.layout)
            shared = host is not None and role in candidate.together
            start = host[0] if host is not None and shared else 0
            keys[f"resource_pool.{role}"] = splits(job.layout.devices, per_node, start)
    keys["resource_pool.colocate"] = candidate.together
    return keys


def _layout(section: str, layout: Layout) -> dict[str, Any]:
    return {
        f"{section}.tensor_model_parallel_size": layout.tp,
        f"{section}.pipeline_model_parallel_size": layout.pp,
        f"{section}.virtual_pipeline_model_parallel_size": 1,
        f"{section}.context_parallel_size": layout.cp,
        f"{section}.sequence_parallel": layout.sequence_parallel,
    }
