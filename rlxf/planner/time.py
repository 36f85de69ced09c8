"""Seconds of each stage of a driver step, by formulas: products over peak, bytes over bandwidth, launches."""

from __future__ import annotations

import math
from dataclasses import replace

from rlxf.planner.device import Device
from rlxf.planner.engine_memory import engine_bytes, engine_weight_bytes, token_bytes
from rlxf.planner.flops import (
    Rows,
    Trained,
    decode_rows,
    forward_flops,
    model_flops,
    prefill_rows,
    stream,
)
from rlxf.planner.jobs import BYTES, EngineJob, ForwardJob, Jobs, Layout, Precision, Shape, TrainJob, Work
from rlxf.planner.memory import with_share
from rlxf.planner.pace import ADV, GEN, REF, SYNC, UPDATE, Pace, Stage, pace
from rlxf.planner.passes import Share, all_reduce_seconds, bubble, exchange_seconds, gradient_seconds, share_of
from rlxf.planner.states import trained_state_bytes

__all__ = ["Pace", "Stage", "forward", "pace", "push", "push_of", "sampling", "stages_of", "update"]

PREFILL_TOKENS = 8192  # of one pass: of the hf engine (rlxf/rollout/hf_sampling.py), and about vLLM's default
NOISE_S = (
    2.7e-8  # of a number that the hf engine draws on the host: 64 x 128,256 of them take 218 ms, docs/platforms.md
)
_GRADIENT_BYTES = 4  # of a number: fp32 whatever the weights are
# Bytes of a trained weight that an optimizer step reads and writes: gradient (for its norm, for the step, and to clear
# it), copy in fp32, two moments; in half precision also the weight itself.
OPTIMIZER_BYTES = {"fp32": 36, "bf16": 38, "fp16": 38}


def sampling(job: EngineJob, work: Work, device: Device) -> Stage:
    """Prompts, then one token of every sequence at a time. Engines are dealt whole prompts (``rollout.dispatch``).

    All sequences decode together until the mean length; then those that are longer go on, fewer and fewer, which costs
    what one alone costs. Where an engine has more sequences than slots, others take the place of those that end.
    """
    shape, busy = job.shape, min(job.engines, max(work.prompts, 1))
    prompts = math.ceil(work.prompts / job.engines) if job.engines > 1 else work.prompts
    own = replace(work, prompts=prompts)
    sequences, fed = own.completions, max(work.completion_tokens - 1, 0.0)
    slots = min(sequences, _slots(job, work, device))
    rounds = sequences / slots if slots else 0.0
    calls = math.ceil(rounds)  # of the hf engine: one ends before the next one begins
    full = fed * (rounds if job.kind == "vllm" else calls)
    together = _token_seconds(job, work, device, slots)
    alone = _token_seconds(job, work, device, 1.0)
    tail = (work.longest - 1) * work.completion_tokens * (1 if job.kind == "vllm" else calls)
    seconds = _prefill_seconds(job, own, device) + full * together + tail * alone
    flops = forward_flops(shape, prefill_rows(work)).total + forward_flops(shape, decode_rows(work)).total
    return _stage(GEN, seconds, flops, busy * job.tp, device)


def _slots(job: EngineJob, work: Work, device: Device) -> float:
    """Sequences that one engine decodes at a time: by the setting, and by the room for keys and values."""
    if job.kind == "hf":
        return math.inf if job.slots is None else float(job.slots)
    slots = float(job.slots or device.engine_slots)
    room = float(job.cpu_cache_bytes)
    if not device.is_cpu:
        needs = engine_bytes(job, work, device)
        room = device.memory * (job.utilization or 1.0) - (needs.total - needs.cache)
    token = token_bytes(job.shape, job.tp, job.precision)
    sequence = token * (work.prompt_tokens / max(work.samples, 1) + work.completion_tokens)
    return max(min(slots, room // sequence if sequence else slots), 1.0)


def _token_seconds(job: EngineJob, work: Work, device: Device, sequences: float) -> float:
    """One token of each of ``sequences``: products, bytes, sums over ranks, and launches."""
    shape, size = job.shape, BYTES[job.precision]
    context = work.prompt_tokens + work.completion_tokens / 2
    seen = Rows(tokens=sequences, read=sequences, seen=sequences * context)
    compute = forward_flops(shape, seen).total / (device.peak(job.precision) * device.decode_share * job.tp)
    weights = (shape.body + shape.head) * size
    cache = sequences * context * token_bytes(shape, job.tp, job.precision)
    memory = (weights / job.tp + cache) / device.bandwidth
    # A device loads what comes next beside its products; a core does so in part (benchmarks/planner.py).
    seconds = (math.hypot(compute, memory) if device.is_cpu else max(compute, memory)) + device.token_s
    if job.tp > 1:
        calls = 2 * shape.layers
        seconds += all_reduce_seconds(device, job.tp, job.tp, calls, calls * sequences * shape.hidden * size)
    if job.kind == "hf":
        seconds += sequences * shape.vocab * NOISE_S
        if not device.is_cpu:  # no graphs
            seconds += shape.layers * device.pass_s
    return seconds


def _prefill_seconds(job: EngineJob, own: Work, device: Device) -> float:
    rows, shape = prefill_rows(own), job.shape
    compute = forward_flops(shape, rows).total / (device.peak(job.precision) * device.forward_share * job.tp)
    passes = max(math.ceil(rows.tokens / PREFILL_TOKENS), 1)
    seconds = compute + passes * shape.layers * device.pass_s
    if job.tp > 1:
        calls = 2 * shape.layers
        num_bytes = calls * rows.tokens * shape.hidden * BYTES[job.precision]
        seconds += all_reduce_seconds(device, job.tp, job.tp, calls * passes, num_bytes)
    return seconds


def forward(job: ForwardJob, work: Work, device: Device, *, chunks: int = 1) -> Stage:
    """The reference (the sides of pairs) or a reward model (all completions).

    ``chunks``: of a step that is streamed; each has passes of its own.
    """
    scores = job.shape.scores
    if scores:
        prompts, sides = float(work.prompts), float(work.samples)
    else:
        trained = Trained.of(work)
        prompts, sides = trained.prompts, trained.sides
    name = ADV if scores else REF
    if not prompts:
        return Stage(name=name, seconds=0.0, flops=0.0, devices=job.layout.devices)
    # More sequences of a prompt than a pass takes are cut, and each part computes the prompt.
    together = min(sides, float(max(job.largest.sequences, 1)))
    parts = math.ceil(sides / together - 1e-9)
    unit = stream(work.prompt_tokens, work.completion_tokens, sides / parts, share=job.share_prompts, scores=scores)
    share = share_of(prompts * parts / chunks, unit, job.layout, job.largest, sides / parts)
    seconds = chunks * _pass_seconds(job.shape, job.layout, job.precision, device, share, device.forward_share)
    flops = forward_flops(job.shape, unit.times(prompts * parts)).total
    return _stage(name, seconds, flops, job.layout.devices, device)


def _pass_seconds(
    shape: Shape, layout: Layout, precision: Precision, device: Device, share: Share, reached: float
) -> float:
    """Of a rank's forward passes without gradient. The last pipeline stage has the head, too."""
    flops = forward_flops(shape, share.rows)
    rank = ((flops.body + flops.attention) / layout.pp + flops.head) / (layout.tp * layout.cp)
    seconds = rank / (device.peak(precision) * reached)
    seconds += share.passes * shape.layers / layout.pp * device.pass_s
    seconds += exchange_seconds(shape, layout, precision, device, share, forwards=1, backward=False)
    return seconds * bubble(layout, share.passes)


def update(job: TrainJob, work: Work, device: Device) -> Stage:
    """All optimizer steps of a driver step: forward, backward, gradients over the ranks, optimizer."""
    trained = Trained.of(work)
    layout, devices = job.layout, job.layout.devices
    if not trained.prompts:
        return Stage(name=UPDATE, seconds=0.0, flops=0.0, devices=devices)
    scores = job.shape.scores
    unit = stream(
        work.prompt_tokens, work.completion_tokens, trained.sides, share=job.share_prompts and trained.sides > 1,
        scores=scores,
    )  # fmt: skip
    whole, rest = divmod(work.pairs, job.mini_batch)
    prompts = trained.prompts / work.pairs  # of a pair
    seconds = 0.0
    for number, pairs in ((whole, float(job.mini_batch)), (1.0, rest)):
        if number and pairs > 1e-9:
            share = share_of(pairs * prompts, unit, layout, job.largest, trained.sides)
            seconds += number * (_gradient_pass_seconds(job, share, device) + _optimizer_seconds(job, device))
    flops = job.epochs * model_flops(job.shape, unit.times(trained.prompts))
    return _stage(UPDATE, job.epochs * seconds, flops, devices, device)


def _gradient_pass_seconds(job: TrainJob, share: Share, device: Device) -> float:
    """Forward and backward of a rank's passes.

    A backward pass costs two forward ones: the gradients of inputs and of weights; with adapters the weights have none.
    The head's logits are always computed again, attention and layers where the recipe says so.
    """
    shape, layout = job.shape, job.layout
    flops = forward_flops(shape, share.rows)
    again = job.recompute == "full"
    backward = 1 if job.lora is not None else 2
    body = flops.body * (1 + backward + again)
    attention = flops.attention * (3 + (job.recompute != "none"))
    head = flops.head * (2 + backward)
    rank = ((body + attention) / layout.pp + head) / (layout.tp * layout.cp)
    seconds = rank / (device.peak(job.precision) * device.train_share)
    seconds += share.passes * shape.layers / layout.pp * device.pass_s * (3 + again)
    if job.lora is None:  # every pass adds its gradients to sums in fp32
        weights = shape.parameters / (layout.tp * layout.pp)
        seconds += share.passes * weights * (2 * BYTES[job.precision] + 8) / device.bandwidth
    seconds += exchange_seconds(shape, layout, job.precision, device, share, forwards=1 + again, backward=True)
    return seconds * bubble(layout, share.passes)


def _optimizer_seconds(job: TrainJob, device: Device) -> float:
    layout = job.layout
    own = trained_state_bytes(job).gradients / _GRADIENT_BYTES  # numbers that a rank trains
    local = own / (layout.dp * layout.cp)
    seconds = local * OPTIMIZER_BYTES[job.precision] / device.bandwidth
    return seconds + gradient_seconds(layout, own, job.precision, device)


def push(train: TrainJob, engine: EngineJob, device: Device, *, shared: bool) -> Stage:
    """New weights into every engine.

    On shared devices a rank gathers what others hold, and copies it. Otherwise every weight is sent once to all. On a
    CPU it goes through shared memory.
    """
    num_bytes = train.shape.parameters * BYTES[engine.precision]
    parts = train.layout.tp * train.layout.pp
    devices = max(train.layout.devices, engine.devices) if shared else train.layout.devices + engine.devices
    gathered = num_bytes * (parts - 1) / parts / device.speed(train.layout.devices)
    if device.is_cpu:
        seconds = num_bytes / device.host
    elif shared:
        seconds = gathered + 2 * num_bytes / engine.tp / device.bandwidth
    else:
        seconds = gathered + num_bytes / device.speed(devices)
    return _stage(SYNC, seconds + device.push_s, 0.0, devices, device)


def push_of(jobs: Jobs, device: Device) -> Stage:
    """The push of jobs that have engines; where trainer and engines take turns, with what leaves a device and comes."""
    assert jobs.engine is not None
    shared = any({"train", "infer"} <= set(place.roles) for place in jobs.places) or jobs.local
    stage = push(jobs.train, jobs.engine, device, shared=shared)
    if not jobs.takes_turns or device.is_cpu:  # there nothing is copied
        return stage
    states = trained_state_bytes(jobs.train)
    moved = states.main + states.moments  # gradients are dropped
    if device.sleeps_on_host:
        moved += engine_weight_bytes(jobs.engine)
    return replace(stage, seconds=stage.seconds + 2 * moved / device.host)


def stages_of(jobs: Jobs, device: Device, work: Work | None = None) -> dict[str, Stage]:
    """By name; only those that the recipe has. ``work``: in place of the jobs' own.

    Several reward models share their devices, so one follows the other.
    """
    work = jobs.work if work is None else work
    found: dict[str, Stage] = {}
    engine = with_share(jobs, device).engine
    if engine is not None:
        found[GEN] = sampling(engine, work, device)
    if jobs.rewards:
        each = [forward(reward, work, device, chunks=jobs.chunks) for reward in jobs.rewards]
        seconds, flops = sum(stage.seconds for stage in each), sum(stage.flops for stage in each)
        found[ADV] = replace(each[0], seconds=seconds, flops=flops)
    if jobs.reference is not None:
        found[REF] = forward(jobs.reference, work, device, chunks=jobs.chunks)
    elif jobs.train.refers:
        found[REF] = forward(_own_reference(jobs.train), work, device, chunks=jobs.chunks)
    found[UPDATE] = update(jobs.train, work, device)
    if jobs.engine is not None:
        found[SYNC] = push_of(jobs, device)
    return found


def _own_reference(job: TrainJob) -> ForwardJob:
    """The trained model with its adapters off."""
    return ForwardJob(
        role="train", name="ref", shape=job.shape, layout=job.layout, precision=job.precision, largest=job.largest,
        share_prompts=job.share_prompts,
    )  # fmt: skip


def _stage(name: str, seconds: float, flops: float, devices: int, device: Device) -> Stage:
    """On a CPU processes are as many as devices; those beyond its cores wait for one."""
    if device.is_cpu and devices > device.per_node:
        seconds, devices = seconds * devices / device.per_node, device.per_node
    return Stage(name=name, seconds=seconds, flops=flops, devices=devices)
