"""Starting a run on Ray: cluster, pools, one worker per slot, all models loading at the same time, then the driver."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rlxf.assembly.build_run import Roles
from rlxf.assembly.judge import open_function_judge
from rlxf.assembly.rewards import open_readers
from rlxf.assembly.start import clocked, prepared, run_prepared
from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.core.command import Typed
from rlxf.core.places import CHECKOUT
from rlxf.core.stop import Stop
from rlxf.loop.run import Reference
from rlxf.placement.plan import Plan, make_plan
from rlxf.platform import Platform, get_platform
from rlxf.platform.environment import differing_exports, with_exports
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.reference.none import NoReference
from rlxf.schedule import InThreads, OneAfterTheOther
from rlxf.sync.transports import choose_transport

from .actor import ActorWorker, RemoteActor
from .cluster import Cluster, connect
from .group import Member, WorkerGroup
from .pools import Pools
from .reference import ReferenceWorker, RemoteReference
from .remote import Pending, Waiter
from .reward import RemoteScorer, RewardWorker
from .rollout import RemoteEngines, RolloutWorker

log = logging.getLogger(__name__)

WORKERS: dict[Role, type] = {
    "train": ActorWorker,
    "infer": RolloutWorker,
    "ref": ReferenceWorker,
    "reward": RewardWorker,
}


def launch(config: RunConfig, run_dir: Path, typed: Typed | None = None) -> None:
    """Run the recipe on Ray; what it leaves is under ``run_dir``, and in ``actor_rollout.save`` if set.

    ``typed``: the command, for messages.
    """
    stop = Stop(grace_s=config.training.stop_grace_s)
    with prepared(config, run_dir, stop, typed) as found:
        if found is None:
            return
        config = found.config
        platform = get_platform(config.training.device, cpu_linear=config.training.cpu_linear)
        plan = make_plan(config)
        with (
            open_readers(config, stop) as readers,
            open_function_judge(config, stop) as judge,
            clocked(found) as clock,
            connected(plan, platform, stop) as cluster,
        ):
            waiter = Waiter(clock, stop, config.training.stage_timeout_s, cluster.logs)
            with stop.interruptible():
                groups, loading = start_workers(config, plan, platform, waiter)
                waiter.gather(loading, config.training.start_timeout_s)
            roles = replace(make_roles(config, platform, groups), readers=readers, judge=judge)
            # Without lookahead the stages of a step follow each other anyway.
            lanes = InThreads(stop) if config.rollout.lookahead else OneAfterTheOther()
            run_prepared(found, roles, platform=platform, clock=clock, stop=stop, lanes=lanes)


@contextmanager
def connected(plan: Plan, platform: Platform, stop: Stop) -> Iterator[Cluster]:
    """A connection to Ray that leaves no process behind, however the run ends."""
    try:
        cluster = connect(plan, platform)
        stop.clean_up = cluster.disconnect
        stop.install()  # again: Ray has installed handlers of its own
        stop.check()
        yield cluster
    finally:
        ray.shutdown()


def start_workers(
    config: RunConfig, plan: Plan, platform: Platform, waiter: Waiter
) -> tuple[dict[Role, WorkerGroup], list[Pending]]:
    """All worker processes of the run, and the calls that load their models: started, not waited for."""
    pools = Pools(plan, waiter)
    groups: dict[Role, WorkerGroup] = {}
    loading: list[Pending] = []
    for role in plan.roles:
        slots = [(slot.options(), slot.node) for slot in pools.slots(role)]
        groups[role.role] = _start_group(config, role.role, slots, platform, waiter)
    _say_who_is_where(groups)
    _say_exports(config, groups, platform)
    for group in groups.values():
        master = group.members[0].handle.address.remote()  # a reference: Ray hands the value on when it is there
        loading += [
            Pending(member.handle.build.remote(config, master), member.name, "build") for member in group.members
        ]
    return groups, loading


def _start_group(
    config: RunConfig, role: Role, slots: list[tuple[dict[str, Any], str]], platform: Platform, waiter: Waiter
) -> WorkerGroup:
    environment: dict[str, Any] = {"env_vars": _environment(config, role, platform)}
    if shlex.quote(sys.executable) != sys.executable:
        # Ray starts a worker through a shell and quotes everything but the interpreter.
        environment["py_executable"] = shlex.quote(sys.executable)
    worker = ray.remote(WORKERS[role])
    members = [
        Member(
            worker.options(runtime_env=environment, **options).remote(rank, len(slots)),
            f"{role} rank {rank}",
            node,
        )
        for rank, (options, node) in enumerate(slots)
    ]
    return WorkerGroup(members, waiter)


def _say_who_is_where(groups: dict[Role, WorkerGroup]) -> None:
    members = [member for group in groups.values() for member in group.members]
    for node in dict.fromkeys(member.node for member in members):
        log.info("node %s: %s", node, ", ".join(member.rank for member in members if member.node == node))


def _environment(config: RunConfig, role: Role, platform: Platform) -> dict[str, str]:
    """Environment variables of a role's processes: the device's or the user's, and where this checkout is."""
    environment = with_exports(_defaults(config, role, platform), os.environ)
    places = [str(CHECKOUT) if CHECKOUT else None, os.environ.get("PYTHONPATH")]
    if path := os.pathsep.join(filter(None, places)):
        environment["PYTHONPATH"] = path
    return environment


def _defaults(config: RunConfig, role: Role, platform: Platform) -> dict[str, str]:
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if role == "infer":
        return platform.rollout_environment(threads, config.rollout.cpu_kv_cache_gib)
    return platform.worker_environment(threads)


def _say_exports(config: RunConfig, roles: Iterable[Role], platform: Platform) -> None:
    """Which exported variables the workers get in place of a default, and which they do not get."""
    defaults = {name: value for role in roles for name, value in _defaults(config, role, platform).items()}
    taken, refused = differing_exports(defaults, os.environ)
    if taken:
        log.info("the workers use these exported variables: %s", ", ".join(taken))
    if refused:
        log.warning("the workers do not use these exported variables: %s", ", ".join(refused))


def make_roles(config: RunConfig, platform: Platform, groups: dict[Role, WorkerGroup]) -> Roles:
    """The roles as the driver sees them."""
    actor = RemoteActor(groups["train"])
    engines = _connect(config, platform, RemoteEngines(groups["infer"], actor)) if "infer" in groups else None
    return Roles(
        actor=actor,
        reference=_reference(config, groups, actor),
        models={name: RemoteScorer(groups["reward"], name) for name in config.reward_models},
        rollout=engines,
        sink=engines,
    )


def _reference(config: RunConfig, groups: dict[Role, WorkerGroup], actor: RemoteActor) -> Reference:
    if not config.needs_reference:
        return NoReference()
    return AdapterOffReference(actor) if config.reference_is_base else RemoteReference(groups["ref"])


def _connect(config: RunConfig, platform: Platform, engines: RemoteEngines) -> RemoteEngines:
    """The engines, which new weights reach in the best way that recipe, device and placement allow."""
    keeps = config.rollout.lookahead > 0
    transport = choose_transport(config.sync.transport, platform, partial(engines.machines, keeps=keeps))
    engines.connect(transport, keeps=keeps)
    log.info("weights travel through %s", transport.title)
    return engines
