"""Bytes on one device: what each role holds, and the instant at which most of it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rlxf.planner.activations import Seen, activation_bytes, seen
from rlxf.planner.device import Device
from rlxf.planner.engine_memory import EngineBytes, engine_bytes
from rlxf.planner.jobs import BYTES, ForwardJob, Jobs, Pass, Place, Shape, TrainJob
from rlxf.planner.states import StateBytes, linears, state_bytes, trained_state_bytes
from rlxf.planner.transients import backward_bytes, forward_bytes, logit_bytes

__all__ = [
    "Bar",
    "Instant",
    "PlaceMemory",
    "StateBytes",
    "activation_bytes",
    "memory_of",
    "state_bytes",
    "trained_state_bytes",
    "utilization_of",
    "with_share",
]

_ALONE = 0.85  # of its device, for an engine that has it for itself
_MOST = 0.9
MARGIN = 0.05  # of a device's memory that stays free: estimates miss, and allocators leave gaps

Parts = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Instant:
    """A moment of a step, and what is on the device then: ``{"train weights": 3.7e9, ...}``, bytes."""

    name: str  # "forward", "backward", "optimizer step", "log-probs", "sampling", "push"
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What one device holds while the run trains, or while it samples: the maximum over its instants."""

    name: str  # "training" or "sampling"
    instants: tuple[Instant, ...]

    @property
    def worst(self) -> Instant:
        return max(self.instants, key=lambda instant: instant.total)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceMemory:
    """One device of a place. Bars are not added up: where one role sleeps, another one has its memory."""

    place: Place
    bars: tuple[Bar, ...]
    utilization: float | None  # ``gpu_memory_utilization`` of an engine there; None: no vLLM engine of a device is

    @property
    def worst(self) -> tuple[Bar, Instant]:
        bar = max(self.bars, key=lambda bar: bar.worst.total)
        return bar, bar.worst


def memory_of(jobs: Jobs, device: Device) -> tuple[PlaceMemory, ...]:
    """Bytes on a device of each place.

    On a CPU they are those of all processes of the place together, which share the machine's memory; places on one
    machine add up.
    """
    share = utilization_of(jobs, device)
    found = []
    for place in jobs.places:
        view = _Device(jobs, device, place, share)
        utilization = share if "infer" in place.roles else None
        found.append(PlaceMemory(place=place, bars=tuple(view.bars()), utilization=utilization))
    return tuple(found)


def utilization_of(jobs: Jobs, device: Device) -> float | None:
    """``rollout.gpu_memory_utilization`` where the recipe leaves it open; None: no vLLM engine on a device.

    An engine gets what others leave of the device while it samples, less a margin: at most 0.9, and 0.85 of a device of
    its own. It gets never less than it needs for one sequence: then the plan says that it does not fit.
    """
    engine = jobs.engine
    if engine is None or engine.kind != "vllm" or device.is_cpu:
        return None
    if engine.utilization is not None:
        return engine.utilization
    places = [place for place in jobs.places if "infer" in place.roles]
    others = (sum(_Device(jobs, device, place, None).beside_engine().values()) for place in places)
    left = 1 - max(others, default=0.0) / device.memory - MARGIN
    most = _MOST if any(len(place.roles) > 1 for place in places) else _ALONE
    least = engine_bytes(engine, jobs.work, device).least / device.memory
    return max(math.floor(100 * min(left, most)) / 100, math.ceil(100 * least) / 100)


def with_share(jobs: Jobs, device: Device) -> Jobs:
    """With the share of memory that the engines get if the recipe leaves it open: it bounds their sequences."""
    if jobs.engine is None or jobs.engine.utilization is not None:
        return jobs
    return replace(jobs, engine=replace(jobs.engine, utilization=utilization_of(jobs, device)))


class _Device:
    """One device of a place. ``share``: of its memory for an engine that takes all it may."""

    def __init__(self, jobs: Jobs, device: Device, place: Place, share: float | None) -> None:
        self._jobs, self._device, self._place, self._share = jobs, device, place, share
        self._frozen = [job for job in self._all_frozen() if job.role in place.roles]
        self._trains, self._samples = "train" in place.roles, "infer" in place.roles
        self._count = place.devices if device.is_cpu else 1  # of devices whose memory is one
        self._states = trained_state_bytes(jobs.train)

    def _all_frozen(self) -> Iterator[ForwardJob]:
        if self._jobs.reference is not None:
            yield self._jobs.reference
        yield from self._jobs.rewards

    def bars(self) -> Iterator[Bar]:
        training = [Instant(name=name, parts=self._whole(parts)) for name, parts in self._training()]
        sampling = [Instant(name=name, parts=self._whole(parts)) for name, parts in self._sampling()]
        if training:
            yield Bar(name="training", instants=tuple(training))
        if sampling:
            yield Bar(name="sampling", instants=tuple(sampling))

    def _whole(self, parts: Parts) -> Parts:
        return {name: size * self._count for name, size in parts.items() if size}

    def beside_engine(self) -> Parts:
        """What others hold while an engine samples."""
        return self._always() | self._rest(sampling=True) | self._caches(None)

    def _training(self) -> Iterator[tuple[str, Parts]]:
        asleep = self._asleep() if self._samples else {}
        always = self._always() | asleep
        away = self._rest(sampling=self._jobs.takes_turns)  # log-probs come before the optimizer
        passes = [(job.role, _forward_of(job, self._device.kind)) for job in self._frozen]
        if self._trains and self._jobs.train.refers:
            passes.append(("train", _forward_of(self._jobs.train, self._device.kind)))
        if passes:
            role, size = max(passes, key=lambda item: item[1])
            yield "log-probs", always | away | self._caches(role) | {f"{role} forward pass": size}
        if not self._trains:
            return
        full = always | self._rest(sampling=False) | self._caches("train")
        kept, forward, backward = self._update
        yield "forward", full | kept | forward
        yield "backward", full | kept | backward
        yield "optimizer step", full

    def _sampling(self) -> Iterator[tuple[str, Parts]]:
        beside = self.beside_engine()
        if self._samples:
            yield "sampling", beside | self._engine
        if self._jobs.engine is None or not (self._trains or self._samples):
            return
        pushed = self._always() | self._rest(sampling=True) | self._caches("train")
        if self._trains:
            pushed |= _gathers(self._jobs.train)
        if self._samples:
            engine = self._engine
            pushed |= {"infer weights": engine["infer weights"], "infer graphs": engine["infer graphs"]}
            if not self._sleeps:  # only an engine that slept gives its cache back before a push
                pushed |= {"infer cache": engine["infer cache"]}
        yield "push", pushed

    def _always(self) -> Parts:
        """Contexts of all processes, room for a push, and the weights of frozen models."""
        jobs, roles = self._jobs, self._place.roles
        processes = self._trains if jobs.local else len(roles)  # one process for all places
        found: Parts = {"contexts": processes * self._device.context}
        if jobs.engine is not None and not jobs.local:
            # By handles only the trainer has room; a broadcast needs room at both ends; a CPU's is shared by all.
            room = _room(jobs, all_buckets=self._device.is_cpu and jobs.lookahead > 0)
            if self._trains or (self._samples and not self._device.is_cpu and not jobs.takes_turns):
                found["push buckets"] = room / self._count
        for job in self._frozen:
            name = f"{job.role} weights"
            found[name] = found.get(name, 0) + state_bytes(job.shape, job.layout, job.precision).total
        return found

    def _rest(self, *, sampling: bool) -> Parts:
        """The trainer's states; ``sampling``: what stays of them when others have their turn."""
        if not self._trains:
            return {}
        states = self._states
        found: Parts = {"train weights": states.weights}
        if sampling and self._jobs.takes_turns:
            # A CPU's optimizer is in the memory of the host, where it stays.
            return found | (self._optimizer() if self._device.is_cpu else {})
        return found | {"train gradients": states.gradients} | self._optimizer()

    def _optimizer(self) -> Parts:
        return {"train main parameters": self._states.main, "train moments": self._states.moments}

    def _caches(self, active: str | None) -> Parts:
        """What allocators of idle processes keep of their passes: no other process can have it.

        Where trainer and engines take turns, the trainer gives its own back. The C library of a CPU does so by itself.
        """
        if self._device.is_cpu or self._jobs.local:
            return {}
        found: Parts = {}
        for job in self._frozen:
            if job.role != active:
                name = f"{job.role} allocator"
                found[name] = max(found.get(name, 0), _forward_of(job, self._device.kind))
        if self._trains and active != "train" and not self._jobs.takes_turns:
            kept, forward, backward = self._update
            found["train allocator"] = sum(kept.values()) + max(sum(forward.values()), sum(backward.values()))
        return found

    @cached_property
    def _update(self) -> tuple[Parts, Parts, Parts]:
        """Kept activations, and what comes on top in the forward pass and in the backward pass."""
        job, kind = self._jobs.train, self._device.kind
        largest, view = job.largest, _seen_by(job)
        kept = activation_bytes(
            job.shape,
            job.layout,
            job.precision,
            job.recompute,
            largest.tokens,
            _passes(job, self._jobs.work.sides),
            job.lora,
            rows=largest.rows,
            view=view,
            kind=kind,
        )
        rows = -(-largest.rows // job.layout.cp)
        forward = 0.0 if job.shape.scores else logit_bytes(job.shape, job.layout, job.precision, rows, kind)
        backward = backward_bytes(
            job.shape,
            job.layout,
            job.precision,
            job.recompute,
            largest.tokens,
            rows=largest.rows,
            view=view,
            lora=job.lora,
            kind=kind,
        )
        named = {f"train {name}": size for name, size in backward.items()}
        return {"train activations": sum(kept.values())}, {"train logits": forward}, named

    @property
    def _sleeps(self) -> bool:
        """vLLM has no sleep on a CPU."""
        engine = self._jobs.engine
        return self._jobs.takes_turns and engine is not None and (engine.kind == "hf" or not self._device.is_cpu)

    @cached_property
    def _engine(self) -> Parts:
        """A vLLM engine of a device fills its share with cache, also where its sequences need less."""
        assert self._jobs.engine is not None
        needs: EngineBytes = engine_bytes(self._jobs.engine, self._jobs.work, self._device)
        share = (self._share or 0) * self._device.memory
        cache = max(needs.cache if self._share is None else needs.one_sequence, share - needs.total + needs.cache)
        return {
            "infer weights": needs.weights,
            "infer cache": cache,
            "infer passes": needs.passes,
            "infer graphs": needs.graphs,
        }

    def _asleep(self) -> Parts:
        """What an engine has while others train: of one that sleeps only its graphs, and those not on an NPU."""
        engine = self._engine
        if not self._sleeps:
            return engine
        return {} if self._device.kind == "npu" else {"infer graphs": engine["infer graphs"]}


def _passes(job: TrainJob, sides: int) -> int:
    """Micro-batches of a mini-batch on one rank."""
    sequences = sides * job.mini_batch / job.layout.dp
    return max(math.ceil(sequences / max(job.largest.sequences, 1)), 1)


def _seen_by(job: TrainJob | ForwardJob) -> Seen | None:
    """What attention sees in the largest pass of a job."""
    largest: Pass = job.largest
    shares = job.share_prompts and largest.sequences > 1 and not job.shape.scores
    shared = max(largest.tokens - largest.rows, 0) if shares else 0
    return seen(largest.tokens, largest.sequences, shared, cp=job.layout.cp, together=2)


def _forward_of(job: TrainJob | ForwardJob, kind: str) -> float:
    """Most that a pass without gradient has."""
    lora = job.lora if isinstance(job, TrainJob) and not job.refers else None
    return forward_bytes(
        job.shape,
        job.layout,
        job.precision,
        job.largest.tokens,
        rows=job.largest.rows,
        view=_seen_by(job),
        lora=lora,
        kind=kind,
    )


def _room(jobs: Jobs, *, all_buckets: bool = False) -> float:
    """Memory of a push: two buckets of whole layers (``rlxf/sync/plan.py``), or all of them."""
    shape, width = jobs.train.shape, BYTES[jobs.train.precision]
    total = width * shape.parameters
    if all_buckets:
        return total
    return min(2 * largest_bucket(shape, width, jobs.train.bucket_bytes), total)


def largest_bucket(shape: Shape, width: int, limit: int) -> int:
    """Bytes of the largest of the buckets that ``plan_buckets`` makes: embedding, layers, norm, head, in this order."""
    layer, table = width * (shape.layer_weights + shape.layer_vectors), width * shape.head
    beside = min(max(limit - table, 0) // layer, shape.layers)
    current = largest = table + beside * layer
    each = max(limit // layer, 1)
    full, rest = divmod(shape.layers - beside, each)
    if full or rest:
        current = (rest or each) * layer
        largest = max(largest, each * layer if full else current)
    for size in (width * shape.hidden, 0 if shape.tied else table):
        current = current + size if current + size <= limit else size
        largest = max(largest, current)
    return largest


def _gathers(job: TrainJob) -> Parts:
    """Of one parameter at a time: shares and the whole of it, and adapters merged in fp32."""
    shape, layout, width = job.shape, job.layout, BYTES[job.precision]
    found: Parts = {}
    if layout.tp > 1 or layout.pp > 1:
        found["train gathered weights"] = 2 * width * max(shape.head, 2 * shape.hidden * shape.ffn)
    if job.lora is not None:
        held = (linear.numbers for linear in linears(shape, layout.tp) if linear.name in job.lora.targets)
        found["train merged weights"] = 3 * 4 * max(held, default=0)
    return found
