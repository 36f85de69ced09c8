"""What a search knows: the layouts of each role, and of roles that share devices, made when they are needed first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.planner.device import Device
from rlxf.planner.estimate import CHUNKS
from rlxf.planner.jobs import Jobs, Place, Recompute, TrainJob
from rlxf.planner.memory import MARGIN, memory_of, with_share
from rlxf.planner.options import Option, layouts, pareto, sizes, with_budget
from rlxf.planner.time import Stage, forward, sampling, update

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_BUDGETS = (4096, 8192, 16384, 32768)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Devices, and the roles on them, each with its layout."""

    options: Mapping[Role, Option[Any]]
    devices: int

    @property
    def seconds(self) -> float:
        """Of its stages, one after the other."""
        return sum(option.seconds for option in self.options.values())


@dataclass(kw_only=True)
class Tables:
    """Of one recipe on one kind of device."""

    config: RunConfig
    base: Jobs
    device: Device
    per_node: int  # devices of a machine, inside which tensor parallelism stays
    _options: dict[tuple[Role, int], list[Option[Any]]] = field(default_factory=dict)
    _pools: dict[tuple[tuple[Role, ...], int], Pool | None] = field(default_factory=dict)

    @property
    def room(self) -> float:
        """Bytes of a device that a layout may take."""
        return (1 - MARGIN) * self.device.memory

    def options(self, role: Role, devices: int) -> list[Option[Any]]:
        """The layouts of a role on so many devices that are fastest for their memory, fastest first."""
        key = (role, devices)
        if key not in self._options:
            found = _WAYS[role](self, devices)
            self._options[key] = pareto(option for option in found if option.bytes <= self.room)
        return self._options[key]

    def pool(self, roles: tuple[Role, ...], devices: int) -> Pool | None:
        """The fastest layouts of roles that share so many devices; None: nothing fits."""
        key = (roles, devices)
        if key not in self._pools:
            self._pools[key] = self._fastest(roles, devices)
        return self._pools[key]

    def _fastest(self, roles: tuple[Role, ...], devices: int) -> Pool | None:
        """Roles that share devices follow each other, so the sum of their seconds counts."""
        choices = [self.options(role, devices) for role in roles]
        best: Pool | None = None
        for chosen in sorted(product(*choices), key=lambda options: sum(option.seconds for option in options)):
            if best is not None and sum(option.seconds for option in chosen) >= best.seconds:
                break  # beside others an engine has less memory, and is never faster than alone
            pool = Pool(options=dict(zip(roles, chosen, strict=True)), devices=devices)
            found = pool if len(roles) == 1 else self._beside_others(pool)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _beside_others(self, pool: Pool) -> Pool | None:
        """A pool with the seconds of an engine that has only the memory which others leave; None: it does not fit."""
        jobs = self.jobs((pool,))
        if any(place.worst[1].total > self.room for place in memory_of(jobs, self.device)):
            return None
        if "infer" not in pool.options:
            return pool
        engine = replace(pool.options["infer"], stage=self.sampled(jobs))
        return replace(pool, options={**pool.options, "infer": engine})

    def sampled(self, jobs: Jobs) -> Stage:
        """The sampling of jobs whose engines take the share of memory that is left for them."""
        engine = with_share(jobs, self.device).engine
        assert engine is not None
        return sampling(engine, self.base.work, self.device)

    def jobs(self, pools: Sequence[Pool], *, lookahead: int = 0, streams: bool = False) -> Jobs:
        """The recipe's jobs in other layouts. A role that is in no pool takes no memory."""
        jobs: dict[Role, Any] = {role: option.job for pool in pools for role, option in pool.options.items()}
        places = tuple(
            Place(name="+".join(pool.options), roles=tuple(pool.options), devices=pool.devices) for pool in pools
        )
        return replace(
            self.base,
            train=jobs.get("train", self.base.train),
            engine=jobs.get("infer", self.base.engine),
            reference=jobs.get("ref", self.base.reference),
            rewards=jobs.get("reward", self.base.rewards),
            places=places,
            lookahead=lookahead,
            chunks=CHUNKS if streams else 1,
            takes_turns=any({"train", "infer"} <= set(place.roles) for place in places),
            local=False,
        )

    def alone(self, role: Role, devices: int, **jobs: Any) -> tuple[Jobs, float]:
        """Jobs of a role that has its devices to itself, and the bytes that it then has on one."""
        place = Place(name=role, roles=(role,), devices=devices)
        found = replace(self.base, places=(place,), takes_turns=False, **jobs)
        return found, max(one.worst[1].total for one in memory_of(found, self.device))


def _train(tables: Tables, devices: int) -> Iterator[Option[Any]]:
    base, work, device = tables.base.train, tables.base.work, tables.device
    for layout in layouts(base.shape, devices, tables.per_node, base.layout.cp):
        if base.mini_batch % layout.dp or work.prompts < layout.dp:
            continue
        for recompute, budget in product(_RECOMPUTE, _budgets(tables, base)):
            largest = with_budget(base.largest, budget)
            job = replace(base, layout=layout, recompute=recompute, largest=largest)
            _, size = tables.alone("train", devices, train=job)
            yield Option(job=job, stage=update(job, work, device), bytes=size)


def _budgets(tables: Tables, base: TrainJob) -> list[int]:
    """Token budgets that hold a longest pair, and give every rank no more than its share of a mini-batch."""
    longest = 2 * tables.config.actor_rollout.seq_length
    return [budget for budget in _BUDGETS if budget >= longest] or [max(longest, base.largest.tokens)]


def _infer(tables: Tables, devices: int) -> Iterator[Option[Any]]:
    base, work, device = tables.base.engine, tables.base.work, tables.device
    assert base is not None
    for tp in sizes(base.shape.heads, tables.per_node):
        whole = devices % tp == 0 and (tp == 1 or (base.kind == "vllm" and not device.is_cpu))
        if whole and work.prompts >= devices // tp:
            job = replace(base, engines=devices // tp, tp=tp, utilization=None)
            jobs, size = tables.alone("infer", devices, engine=job)
            yield Option(job=job, stage=tables.sampled(jobs), bytes=size)


def _reference(tables: Tables, devices: int) -> Iterator[Option[Any]]:
    base, work, device = tables.base.reference, tables.base.work, tables.device
    assert base is not None
    for layout in layouts(base.shape, devices, tables.per_node):
        job = replace(base, layout=layout)
        _, size = tables.alone("ref", devices, reference=job)
        yield Option(job=job, stage=forward(job, work, device), bytes=size)


def _rewards(tables: Tables, devices: int) -> Iterator[Option[Any]]:
    rewards, work, device = tables.base.rewards, tables.base.work, tables.device
    for layout in layouts(rewards[0].shape, devices, tables.per_node):
        jobs = tuple(replace(base, layout=layout) for base in rewards)
        stages = [forward(job, work, device) for job in jobs]
        stage = Stage(
            name=stages[0].name,
            seconds=sum(stage.seconds for stage in stages),
            flops=sum(stage.flops for stage in stages),
            devices=devices,
        )
        _, size = tables.alone("reward", devices, rewards=jobs)
        yield Option(job=jobs, stage=stage, bytes=size)


_WAYS = {"train": _train, "infer": _infer, "ref": _reference, "reward": _rewards}
