"""What to change in a recipe whose memory does not fit: the changes that cost least time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.planner.estimate import Estimate, estimate_of
from rlxf.planner.options import splits
from rlxf.planner.overrides import changed, different

_SECTIONS: Mapping[Role, str] = {"train": "actor_rollout", "infer": "actor_rollout", "ref": "ref", "reward": "reward"}
_MOST_TOGETHER = 3  # changes at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class WayOut:
    """Overrides with which a recipe fits."""

    overrides: Mapping[str, Any]
    estimate: Estimate


def ways_out(config: RunConfig, found: Estimate, *, most: int = 3) -> list[WayOut]:
    """Overrides with which the recipe fits, at most ``most``; empty if none is known.

    Those with the fewest changes come first, and of these the fastest. No way contains another one. Batch sizes and
    losses stay as they are; more devices are named after all that needs none.
    """
    changes = [change for change in (different(config, one) for one in _changes(config, found)) if change]
    more = [change for change in (different(config, one) for one in _more_devices(config, found)) if change]
    ways: list[WayOut] = []
    for offered in (changes, more, [*changes, *more]):
        for count in range(1, _MOST_TOGETHER + 1):
            fitting = list(_fitting(config, found, offered, count, ways))
            ways += sorted(fitting, key=lambda way: (way.estimate.jobs.num_devices, way.estimate.pace.seconds))
            if len(ways) >= most:
                return ways[:most]
    return ways


def _fitting(
    config: RunConfig, found: Estimate, changes: list[dict[str, Any]], count: int, ways: list[WayOut]
) -> Iterator[WayOut]:
    """The ways of so many changes, without those that contain one of ``ways``."""
    known = [way.overrides.items() for way in ways]
    for chosen in combinations(changes, count):
        keys = [key for change in chosen for key in change]
        overrides = {key: value for change in chosen for key, value in change.items()}
        if len(keys) > len(overrides) or any(one <= overrides.items() for one in known):
            continue  # two values of one key, or more than is needed
        made = changed(config, overrides)
        if made is None:
            continue
        estimate = estimate_of(made, found.device)
        if estimate.fits:
            yield WayOut(overrides=overrides, estimate=estimate)


def _changes(config: RunConfig, found: Estimate) -> Iterator[dict[str, Any]]:
    """Single changes that need less memory in the places that do not fit."""
    roles = {role for place in found.memory if found.room(place) < 0 for role in place.place.roles}
    jobs = found.jobs
    for role in sorted(roles):
        section = _SECTIONS[role]
        if role == "infer":
            yield from _of_engine(config, found)
            continue
        if role == "train":
            yield {"actor_rollout.recompute_granularity": "selective"}
            yield {"actor_rollout.recompute_granularity": "full"}
            for part in (2, 4):
                tokens = jobs.train.largest.tokens // part
                if tokens >= 2 * config.actor_rollout.seq_length:
                    yield {"actor_rollout.max_tokens_per_micro_batch": tokens}
        yield from _wider(config, section, found)


def _of_engine(config: RunConfig, found: Estimate) -> Iterator[dict[str, Any]]:
    engine = found.jobs.engine
    assert engine is not None
    slots = engine.slots or found.device.engine_slots
    for part in (2, 4, 8):
        yield {"rollout.max_num_seqs": max(slots // part, 1)}
    if config.rollout.gpu_memory_utilization is not None:
        yield {"rollout.gpu_memory_utilization": None}
    for size in (2, 4, 8):
        if size * engine.tp <= found.device.per_node and engine.devices % (size * engine.tp) == 0:
            yield {"actor_rollout.inference_tensor_model_parallel_size": size * engine.tp}


def _wider(config: RunConfig, section: str, found: Estimate) -> Iterator[dict[str, Any]]:
    """More devices for one copy of the model, fewer copies."""
    role = getattr(config, section)
    size: int = role.tensor_model_parallel_size
    train = found.jobs.train
    for factor in (2, 4, 8):
        wide = size * factor
        if wide > found.device.per_node:
            return
        change: dict[str, Any] = {
            f"{section}.tensor_model_parallel_size": wide,
            f"{section}.sequence_parallel": True,
        }
        if section == "actor_rollout":
            dp = train.layout.dp // factor
            if dp and train.mini_batch % dp == 0:
                yield change | {"actor_rollout.ppo_mini_batch_size": train.mini_batch // dp}
        else:
            yield change


def _more_devices(config: RunConfig, found: Estimate) -> Iterator[dict[str, Any]]:
    """Twice and four times the devices for the roles of places that do not fit, as copies or as parts of the model."""
    jobs, per_node = found.jobs, found.device.per_node
    roles = {role for place in found.memory if found.room(place) < 0 for role in place.place.roles}
    if config.sharing & roles and not jobs.takes_turns and not jobs.local:
        yield {"resource_pool.colocate": ()}
    if config.sharing or jobs.local:
        return
    num_infer = jobs.engine.devices if jobs.engine is not None else 0
    for factor in (2, 4):
        if "train" in roles:
            layout, devices = jobs.train.layout, jobs.train.layout.devices * factor
            pool = {
                "actor_rollout.num_gpus_for_train": devices,
                "resource_pool.actor_rollout": splits(devices + num_infer, per_node),
            }
            dp = layout.dp * factor
            if jobs.train.mini_batch % dp == 0:
                yield pool | {"actor_rollout.ppo_mini_batch_size": jobs.train.mini_batch // dp}
            if layout.tp * factor <= per_node:
                key = "actor_rollout.tensor_model_parallel_size"
                yield pool | {key: layout.tp * factor, "actor_rollout.sequence_parallel": True}
        frozen = [("ref", jobs.reference), ("reward", jobs.rewards[0] if jobs.rewards else None)]
        for role, job in frozen:
            if role in roles and job is not None and job.layout.tp * factor <= per_node:
                yield {
                    f"{role}.tensor_model_parallel_size": job.layout.tp * factor,
                    f"{role}.sequence_parallel": True,
                    f"resource_pool.{role}": splits(job.layout.devices * factor, per_node),
                }
