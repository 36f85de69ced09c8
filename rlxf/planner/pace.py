"""How the stages of a step overlap: seconds of a step once the run is under way, and how busy each role is.

The schedule is that of ``rlxf/schedule/lookahead.py``. It is not simulated: in the steady state the slowest cycle of
waits decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlxf.config.kinds import Role
from rlxf.planner.flops import Trained
from rlxf.planner.jobs import Jobs

GEN, ADV, REF, UPDATE, SYNC = "gen", "adv", "ref", "update_actor", "sync"  # of ``timing/<name>``


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a step. ``flops``: of all devices, as MFU counts them (no recomputation, no padding)."""

    name: str  # of ``timing/<name>``: gen, adv, ref, update_actor, sync
    seconds: float  # from begin to end, alone on its devices
    flops: float
    devices: int  # that are at work in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a step takes in the steady state, and how busy each role's devices are."""

    seconds: float
    busy: Mapping[Role, float]  # 0 to 1
    busy_all: float  # device-seconds at work over all device-seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seconds:
    """Of the stages."""

    gen: float
    adv: float
    ref: float
    update: float
    sync: float

    @property
    def total(self) -> float:
        return self.gen + self.adv + self.ref + self.update + self.sync


def pace(
    jobs: Jobs,
    stages: Mapping[str, Stage],
    *,
    lookahead: int,
    streams: bool,
    cores: int | None = None,
    first: float | None = None,
) -> Pace:
    """One step after the other, from the seconds of its stages.

    Args:
        jobs: of the recipe.
        stages: by name.
        lookahead: steps that are sampled ahead.
        streams: a step moves on in chunks.
        cores: of a CPU, which all roles share; None: every device works by itself.
        first: share of the sampling after which the first chunk is there. None: by the longest completion, and by the
            sequences that an engine has more than slots. Equal lengths all end at the same time.
    """
    times = _Seconds(**{name: _seconds(stages, key) for name, key in _FIELDS.items()})
    sharing = _sharing(jobs)
    if jobs.local:
        seconds = times.total
    else:
        chain, ready = _chain(jobs, times, sharing, streams=streams, first=first)
        if lookahead:
            seconds = _ahead(jobs, times, sharing, chain, lookahead)
        else:
            seconds = chain + times.update + times.sync - _begun(jobs, times, sharing, chain, ready)
    if cores is not None:
        seconds = max(seconds, sum(stage.seconds * stage.devices for stage in stages.values()) / cores)
    return _busy(jobs, times, seconds)


_FIELDS = {"gen": GEN, "adv": ADV, "ref": REF, "update": UPDATE, "sync": SYNC}


def _seconds(stages: Mapping[str, Stage], name: str) -> float:
    return stages[name].seconds if name in stages else 0.0


def _sharing(jobs: Jobs) -> frozenset[Role]:
    """The roles that take turns on the same devices."""
    return frozenset(role for place in jobs.places if len(place.roles) > 1 for role in place.roles)


def _chain(
    jobs: Jobs, times: _Seconds, sharing: frozenset[Role], *, streams: bool, first: float | None
) -> tuple[float, float]:
    """Seconds from the begin of a step's sampling until it can be trained on, and until its first mini-batch can.

    A chunk's score takes its part of ``adv``. Chunks arrive evenly from ``first`` on.
    """
    gen, adv, ref, chunks = times.gen, times.adv, times.ref, jobs.chunks
    by_turns = sharing == {"ref", "reward"}
    apart = sharing.isdisjoint({"ref", "reward"}) or by_turns
    if not streams or chunks < 2 or not apart:
        return gen + adv + ref, gen + adv + ref
    if first is None:
        first = _first_chunk(jobs)
    begin, last = gen * first, (adv + ref) / chunks
    slowest = adv + ref if by_turns else max(adv, ref)
    late = times.ref if jobs.train.refers else 0.0  # the trainer answers when the step's turn has come
    if late:
        chain = max(begin + adv, gen + adv / chunks) + late
        return chain, chain
    chain = max(begin + last + (chunks - 1) / chunks * slowest, gen + last)
    steps = _optimizer_steps(jobs)
    part = (chunks / steps) // 1 / chunks  # of the chunks, before the first mini-batch has all its pairs
    ready = max(begin + last + part * slowest, begin + part * (gen - begin) + last)
    return chain, min(ready, chain)


def _first_chunk(jobs: Jobs) -> float:
    engine, work = jobs.engine, jobs.work
    if engine is None:
        return 1.0
    own = work.completions / engine.engines
    rounds = max(own / engine.slots, 1.0) if engine.kind == "vllm" and engine.slots else 1.0
    return 1 / (rounds * work.longest)


def _optimizer_steps(jobs: Jobs) -> float:
    return max(jobs.work.pairs / jobs.train.mini_batch, 1.0) if jobs.train.mini_batch else 1.0


def _begun(jobs: Jobs, times: _Seconds, sharing: frozenset[Role], chain: float, ready: float) -> float:
    """Seconds of the update that lie before the end of the sampling: forward and backward of the first mini-batch."""
    steps = _optimizer_steps(jobs)
    if ready >= chain or steps <= 1 or "train" in sharing:
        return 0.0
    trained = Trained.of(jobs.work)
    return min(times.update / (steps * jobs.train.epochs), chain - ready) if trained.prompts else 0.0


def _ahead(jobs: Jobs, times: _Seconds, sharing: frozenset[Role], chain: float, lookahead: int) -> float:
    """The slowest of: engines, trainer, reward model, reference, and a step's whole way, shared by ``k + 1`` steps.

    Of roles that share devices it is a bound: a lane that is free takes the next step's score before this step's
    reference, which can leave the trainer waiting (``tests/unit/planner/test_pace.py``).
    """
    late = jobs.train.refers
    train = times.update + (times.ref if late else 0.0)
    ref = 0.0 if late else times.ref
    boundary = max(times.gen, train) + times.sync
    lanes = {"reward": times.adv, "ref": ref}
    shared = sum(seconds for role, seconds in lanes.items() if role in sharing)
    if {"train", "infer"} <= sharing:
        own = times.gen + train + times.sync + shared
        return max(own, *(0.0 if role in sharing else seconds for role, seconds in lanes.items()))
    cycles = [boundary, *lanes.values(), (chain + times.update + times.sync) / (lookahead + 1)]
    if "train" in sharing and shared:
        # With k = 1 the next update waits for what its own step has still to go through after this one, unless the
        # reference is so slow that the step is scored before.
        waits = lookahead == 1 and "reward" in sharing and (ref <= train or "ref" in sharing)
        after = times.adv + ref if waits else shared
        cycles.append(train + max(times.sync, after))
    elif "infer" in sharing and shared:
        cycles.append(times.gen + max(times.sync, shared))
    else:
        cycles.append(shared)
    return max(cycles)


def _busy(jobs: Jobs, times: _Seconds, seconds: float) -> Pace:
    on_train = jobs.train.refers and jobs.reference is None
    work: dict[Role, float] = {
        "train": times.update + times.sync + (times.ref if on_train else 0.0),
        "infer": times.gen + times.sync,
        "ref": 0.0 if on_train else times.ref,
        "reward": times.adv,
    }
    own = {role: work[role] for role in jobs.devices}
    busy = {role: min(spent / seconds, 1.0) if seconds else 0.0 for role, spent in own.items()}
    at_work = 0.0
    for place in jobs.places:
        spent = sum(own.get(role, 0.0) for role in place.roles)
        if {"train", "infer"} <= set(place.roles):
            spent -= times.sync  # both take part in it
        at_work += place.devices * min(spent, seconds)
    whole = seconds * jobs.num_devices
    return Pace(seconds=seconds, busy=busy, busy_all=at_work / whole if whole else 0.0)
