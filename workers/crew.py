"""All worker processes of a run: started in their slots, and started again when they are lost."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.core.errors import WorkerLost
from rlxf.core.events import event
from rlxf.core.places import CHECKOUT
from rlxf.placement.plan import Plan
from rlxf.platform import Platform
from rlxf.platform.environment import differing_exports, with_exports

from .actor import ActorWorker
from .devices import device_environment
from .engine import RolloutWorker
from .group import Member, StatelessGroup, WorkerGroup
from .pools import Pools, Slot
from .reference import ReferenceWorker
from .remote import Pending, Waiter
from .reward import RewardWorker
from .watch import Watch
from .worker import NO_RENDEZVOUS

log = logging.getLogger(__name__)

WORKERS: dict[Role, type] = {
    "train": ActorWorker,
    "infer": RolloutWorker,
    "ref": ReferenceWorker,
    "reward": RewardWorker,
}


class Crew:
    """The groups of worker processes, by role.

    Args:
        config: the recipe.
        plan: who gets which device.
        platform: of the devices.
        waiter: waits for the workers.
        watch: follows them.
    """

    def __init__(self, config: RunConfig, plan: Plan, platform: Platform, waiter: Waiter, watch: Watch) -> None:
        self._config, self._platform, self._waiter, self._watch = config, platform, waiter, watch
        self._lock = threading.RLock()  # two stages may lose workers at the same time
        self._pools = Pools(plan, waiter, node_wait_s=config.resilience.node_wait_s)
        self._slots: dict[Role, list[Slot]] = {role.role: self._pools.slots(role) for role in plan.roles}
        self._starts: dict[Role, list[int]] = {role: [0] * len(slots) for role, slots in self._slots.items()}
        self._lost_at: dict[str, float] = {}  # by rank: when a process was started in place of it
        self.groups: dict[Role, WorkerGroup] = {}
        for role, slots in self._slots.items():
            members = [self._start(role, rank) for rank in range(len(slots))]
            kind = StatelessGroup if role in self.stateless and role != "infer" else WorkerGroup
            again = self if config.resilience.max_recoveries else None
            self.groups[role] = kind(members, waiter, again if role in self.stateless else None)
        _say_who_is_where(self.groups)
        _say_exports(config, self.groups, platform)

    @property
    def stateless(self) -> set[Role]:
        """Roles whose processes hold nothing but what they load, and the weights that are pushed into them."""
        moves = self._config.ref.ref_update_interval > 0
        return {"infer", "reward"} if moves else {"infer", "reward", "ref"}

    @property
    def stateful(self) -> dict[Role, WorkerGroup]:
        """The groups whose state is in checkpoints."""
        return {role: group for role, group in self.groups.items() if role not in self.stateless}

    def load(self, roles: Iterable[Role]) -> list[Pending]:
        """The calls that load the models of these roles: made, and not waited for."""
        groups = [self.groups[role] for role in roles]
        return [call for group in groups for call in self._load(group, range(len(group.members)))]

    def gone(self, group: WorkerGroup) -> list[int]:
        """Ranks whose process has ended."""
        return [rank for rank, member in enumerate(group.members) if self._watch.is_gone(member.name)]

    def start_again(
        self, group: WorkerGroup, ranks: Sequence[int], lost: WorkerLost, *, told: bool = False
    ) -> list[Pending]:
        """New processes for these ranks, which are members of the group now, and the calls that load their models.

        ``told``: people know of the loss.

        Raises:
            RunInterrupted: there are no devices for them any more.
        """
        role = self._role(group)
        with self._lock:
            who = ", ".join(group.members[rank].rank for rank in self.gone(group)) or f"{role} rank {ranks[0]}"
            if not told:
                log.warning("%s", lost, extra=event("lost", who=who, phase=lost.stage, step=self._step))
            begin = time.monotonic()
            # First: a wait for devices may break off, and then the members must be seen to be gone as before.
            found = self._pools.living([self._slots[role][rank] for rank in ranks])
            for rank in ranks:
                self._kill(group.members[rank])
            for rank, slot in zip(ranks, found, strict=True):
                self._slots[role][rank] = slot
                group.replace(rank, self._start(role, rank))
                self._lost_at[group.members[rank].rank] = begin
            names = ", ".join(group.members[rank].name for rank in ranks)
            log.info("started again: %s", names)
            return self._load(group, ranks, again=True)

    def wait_for_loading(self, calls: list[Pending]) -> None:
        """Return when what ``start_again`` started is loaded."""
        self._waiter.gather(calls, self._config.training.start_timeout_s)

    def forget(self, group: WorkerGroup) -> None:
        """Nobody asks how long these were away."""
        for member in group.members:
            self._lost_at.pop(member.rank, None)

    def is_back(self, group: WorkerGroup, ranks: Iterable[int]) -> None:
        """These ranks have done a piece of work since they were started again."""
        found = [(name, at) for rank in ranks if (at := self._lost_at.pop(name := group.members[rank].rank, None))]
        if found:
            who, seconds = ", ".join(name for name, _ in found), time.monotonic() - min(at for _, at in found)
            text = "%s: %s back at work after %.1f s, no step is lost"
            what = event("recovered", who=who, step=self._step, seconds=seconds, steps_lost=0)
            place = self._waiter.clock.place
            log.info(text, place, f"{who} is" if len(found) == 1 else f"{who} are", seconds, extra=what)

    @property
    def _step(self) -> int:
        """For people: the first is 1."""
        return self._waiter.clock.step_here + 1

    def _role(self, group: WorkerGroup) -> Role:
        return next(role for role, other in self.groups.items() if other is group)

    def _start(self, role: Role, rank: int) -> Member:
        """A new process in the slot of a rank. Nothing is loaded in it yet."""
        slot, world_size = self._slots[role][rank], len(self._slots[role])
        number = self._starts[role][rank]
        self._starts[role][rank] += 1
        environment: dict[str, Any] = {}
        if shlex.quote(sys.executable) != sys.executable:
            # Ray starts a worker through a shell and quotes everything but the interpreter.
            environment["py_executable"] = shlex.quote(sys.executable)
        devices = device_environment(slot, self._platform, self._waiter, environment)
        environment["env_vars"] = {**_environment(self._config, role, self._platform), **devices}
        key = f"{role}-{rank}-{number}"
        worker = ray.remote(WORKERS[role]).options(runtime_env=environment, **slot.options())
        member = Member(worker.remote(rank, world_size, (self._watch.run, key)), f"{role} rank {rank}", slot.node)
        self._watch.follow(member.name, role=role, node=slot.node, key=key, handle=member.handle)
        return member

    def _load(self, group: WorkerGroup, ranks: Sequence[int], *, again: bool = False) -> list[Pending]:
        # A reference: Ray hands the value on when it is there. Engines have no rendezvous, and one that is started
        # again must not wait until the first one has sampled.
        alone = self._role(group) == "infer"
        master = NO_RENDEZVOUS if alone else group.members[0].handle.address.remote()
        return [group.one(rank, "build", self._config, master, again) for rank in ranks]

    def _kill(self, member: Member) -> None:
        """Also one that lives: a rank cannot join a group that has lost another one."""
        self._watch.leave(member.name)
        ray.kill(member.handle)


def _say_who_is_where(groups: Mapping[Role, WorkerGroup]) -> None:
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
        colocated = config.takes_turns
        return platform.rollout_environment(threads, config.rollout.cpu_kv_cache_gib, colocated=colocated)
    return platform.worker_environment(threads)


def _say_exports(config: RunConfig, roles: Iterable[Role], platform: Platform) -> None:
    """Which exported variables the workers get in place of a default, and which they do not get."""
    # A role at a time: two roles may have different defaults of one variable.
    found = [differing_exports(_defaults(config, role, platform), os.environ) for role in roles]
    taken, refused = (dict.fromkeys(text for each in found for text in each[i]) for i in range(2))
    if taken:
        log.info("the workers use these exported variables: %s", ", ".join(taken))
    if refused:
        log.warning("the workers do not use these exported variables: %s", ", ".join(refused))
