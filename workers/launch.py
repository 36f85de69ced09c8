"""Starting a run on Ray: cluster, pools, one worker per slot, all models loading at the same time, then the driver."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from rlxf.assembly.build_run import Roles
from rlxf.assembly.judge import open_function_judge
from rlxf.assembly.rewards import open_readers
from rlxf.assembly.start import Prepared, clocked, prepared, run_prepared
from rlxf.checkpointing.store import checkpoints_folder
from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.command import Typed
from rlxf.core.files import make_folder
from rlxf.core.stop import Stop
from rlxf.loop.run import Reference
from rlxf.placement.plan import Plan, make_plan
from rlxf.platform import Platform, get_platform
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.reference.none import NoReference
from rlxf.schedule import InThreads, OneAfterTheOther
from rlxf.sync.transports import TRANSPORTS, Choice, Places, choose
from rlxf.sync.transports.transport import Transport

from .actor import RemoteActor
from .cluster import Cluster, connect
from .crew import Crew
from .ending import Ending
from .group import WorkerGroup
from .pools import node_ids
from .recovery import Recovery
from .reference import RemoteReference
from .remote import Waiter
from .reward import RemoteScorer
from .rollout import RemoteEngines
from .storage import require_shared_storage
from .watch import Limits, Watch

log = logging.getLogger(__name__)


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
            watched(config, found.run_dir) as watch,
        ):
            waiter = Waiter(clock, stop, config.training.stage_timeout_s, cluster.logs, watch)
            with stop.interruptible():
                crew = Crew(config, plan, platform, waiter, watch)
                if config.samples:  # a transport that cannot work is an error before a model loads
                    transport_here(config, platform, crew.groups)
                load(crew, waiter, config)
                _require_shared_storage(config, found.run_dir, crew)
            roles = replace(make_roles(config, platform, crew.groups), readers=readers, judge=judge)
            _run(found, roles, crew, watch, platform=platform, clock=clock, stop=stop)


def load(crew: Crew, waiter: Waiter, config: RunConfig) -> None:
    """All models, at the same time; but engines on the trainer's devices first, and alone.

    An engine finds out how much memory is left for its cache: what others take meanwhile would count as its own.
    """
    limit_s = config.training.start_timeout_s
    if config.takes_turns:
        waiter.gather(crew.load(["infer"]), limit_s)
        waiter.gather(crew.groups["infer"].send("sleep"), limit_s)
    others = [role for role in crew.groups if role != "infer" or not config.takes_turns]
    waiter.gather(crew.load(others), limit_s)


def _require_shared_storage(config: RunConfig, run_dir: Path, crew: Crew) -> None:
    """All ranks of the trainer write checkpoints, and the policy, where this process looks for them."""
    root = checkpoints_folder(config.actor_rollout.save, run_dir)
    make_folder(root)
    key = "actor_rollout.save" if config.actor_rollout.save else "hydra.run.dir"
    require_shared_storage(root, key, crew.groups["train"])
    require_shared_storage(run_dir, "hydra.run.dir", crew.groups["train"], ranks=[0])  # writes the policy


def _run(
    found: Prepared, roles: Roles, crew: Crew, watch: Watch, *, platform: Platform, clock: Clock, stop: Stop
) -> None:
    """Train, or evaluate only; again from the last checkpoint when the trainer was lost."""
    engines = roles.sink if isinstance(roles.sink, RemoteEngines) else None
    recovery = Recovery(crew, engines, clock, stop, takes_turns=found.config.takes_turns)
    while True:
        # Else the stages of a step follow each other anyway.
        overlap = found.config.streams or found.config.rollout.lookahead
        lanes = InThreads(stop) if overlap else OneAfterTheOther()
        try:
            return run_prepared(found, roles, platform=platform, clock=clock, stop=stop, lanes=lanes, look=watch.memory)
        except Exception as error:  # noqa: BLE001  a rank may notice the loss of another one before Ray does
            found = recovery.begin_again(found, error)


@contextmanager
def watched(config: RunConfig, run_dir: Path) -> Iterator[Watch]:
    """Who follows the workers."""
    limits = Limits(
        min_deadline_s=config.resilience.min_deadline_s,
        stage_s=config.training.stage_timeout_s,
        start_s=config.training.start_timeout_s,
    )
    watch = Watch(limits, Ending(run_dir / "stacks", node_ids))
    try:
        yield watch
    finally:
        watch.close()


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


def make_roles(config: RunConfig, platform: Platform, groups: Mapping[Role, WorkerGroup]) -> Roles:
    """The roles as the driver sees them."""
    actor = RemoteActor(groups["train"], message_s=config.resilience.min_deadline_s)
    engines = _connect(config, platform, groups, actor) if "infer" in groups else None
    return Roles(
        actor=actor,
        reference=_reference(config, groups, actor),
        models={name: RemoteScorer(groups["reward"], name) for name in config.reward_models},
        rollout=engines,
        sink=engines,
    )


def _reference(config: RunConfig, groups: Mapping[Role, WorkerGroup], actor: RemoteActor) -> Reference:
    if not config.needs_reference:
        return NoReference()
    return AdapterOffReference(actor) if config.reference_is_base else RemoteReference(groups["ref"])


def _connect(
    config: RunConfig, platform: Platform, groups: Mapping[Role, WorkerGroup], actor: RemoteActor
) -> RemoteEngines:
    """The engines, which new weights reach in the best way that recipe, device and placement allow."""

    def chosen() -> Transport:
        choice = transport_here(config, platform, groups)
        transport = TRANSPORTS[choice.name]
        log.info("weights travel through %s (%s)", transport.title, choice.why)
        return transport

    engines = RemoteEngines(
        groups["infer"],
        actor,
        choose=chosen,
        keeps=config.rollout.lookahead > 0,
        asleep=config.takes_turns,
        devices=config.actor_rollout.inference_tensor_model_parallel_size,
    )
    engines.connect()
    return engines


def transport_here(config: RunConfig, platform: Platform, groups: Mapping[Role, WorkerGroup]) -> Choice:
    """The transport for where actor and engines are now.

    Raises:
        ConfigError: the recipe names one that cannot work there.
    """
    actor, engines = (
        tuple(place for places in groups[role].ask("where", platform.name) for place in places)
        for role in ("train", "infer")
    )
    return choose(config.sync.transport, platform, Places(actor=actor, engines=engines))
