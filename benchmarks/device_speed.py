"""The parts of device.py that measure time and memory."""

from __future__ import annotations

import collections
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_numbers import Bench, load, random_sequences
from benchmarks.random_world import Shape
from rlxf.core.types import Pairs, PairValues, ReferencedPairs

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # bf16 without sparsity, as the maker states for the SXM boards


def timed(bench: Bench, call: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        bench.platform.synchronize()
        begin = time.perf_counter()
        call()
        bench.platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def free(bench: Bench) -> None:
    gc.collect()
    bench.platform.empty_cache()
    if not bench.is_cpu:
        bench.accelerator.reset_peak_memory_stats()


def peak_flops(bench: Bench) -> float:
    if bench.is_cpu:
        return float("nan")
    name = bench.accelerator.get_device_properties(0).name
    return next((flops for kind, flops in PEAK_FLOPS.items() if kind in name), float("nan"))


def ceiling(bench: Bench) -> dict[str, Any]:
    """What the machine reaches: a large product of random bf16 matrices, and a copy inside its memory."""
    size = 512 if bench.small else 8192
    a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    seconds = timed(bench, lambda: torch.mm(a, b, out=out), repeats=20)
    source = torch.empty(2**20 if bench.small else 2**31, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = timed(bench, lambda: target.copy_(source), repeats=20)
    return {
        "matmul": {"tflops": 2 * size**3 / seconds / 1e12, "size": size},
        "copy": {"gb_per_s_read_and_written": 2 * source.numel() / copied / 1e9},
    }


@contextmanager
def counted_syncs(bench: Bench) -> Iterator[collections.Counter[str]]:
    """Where the host waited for the device inside the block: line of Python -> times."""
    counts: collections.Counter[str] = collections.Counter()
    if bench.is_cpu:
        yield counts
        return
    bench.platform.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bench.accelerator.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            bench.accelerator.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            counts["/".join(warning.filename.split("/")[-2:]) + f":{warning.lineno}"] += 1


def head_options(bench: Bench) -> dict[str, dict[str, Any]]:
    """Ways to cut the head's logits and to compute their softmax."""
    own = {"chunks": bench.platform.logit_chunks}
    return {
        "chunks of a CPU": {},
        "the platform's chunks": own,
        "the platform's chunks and kernels": own | {"elementwise": bench.platform.elementwise},
    }


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def head(bench: Bench) -> dict[str, Any]:
    """Log-probs of the targets from hidden states, forward and backward, beside full logits."""
    from rlxf.models.logps import target_logps

    shape, found = bench.shape("1b"), dict[str, Any]()
    ways: dict[str, Callable[..., Tensor]] = {"full logits": full_logits}
    ways |= {name: partial(target_logps, **options) for name, options in head_options(bench).items()}
    for rows in (64,) if bench.small else (2048, 8192):
        hidden = torch.randn(rows, shape.hidden, device=bench.device).bfloat16().requires_grad_()
        weight = (torch.randn(shape.vocab, shape.hidden, device=bench.device) * 0.02).bfloat16().requires_grad_()
        targets = torch.randint(0, shape.vocab, (rows,), device=bench.device)
        for name, way in ways.items():
            free(bench)
            found[f"{rows} rows, {name}"] = one_head(bench, partial(way, hidden, weight, targets))
            # Forward, and in backward both gradients; ours computes the logits once more, which does not count.
            flops = 6 * rows * shape.vocab * shape.hidden
            found[f"{rows} rows, {name}"]["tflops"] = flops / found[f"{rows} rows, {name}"]["both_ms"] / 1e9
            hidden.grad = weight.grad = None
    return found


def one_head(bench: Bench, logps: Callable[[], Tensor]) -> dict[str, Any]:
    def both() -> None:
        logps().sum().backward()

    seconds = timed(bench, both, repeats=3, warm_up=2)
    with torch.no_grad():
        forward = timed(bench, logps, repeats=3, warm_up=1)
    peak = bench.platform.max_memory_allocated() / 2**30
    with counted_syncs(bench) as syncs:
        both()
    return {"forward_ms": 1e3 * forward, "both_ms": 1e3 * seconds, "peak_gib": peak, "syncs": sum(syncs.values())}


def make_pairs(bench: Bench, number: int, vocab: int) -> Pairs:
    ranges = ((8, 16), (8, 30)) if bench.small else ((256, 512), (256, 768))
    both = random_sequences(2 * number, *ranges, vocab)
    first = torch.arange(0, 2 * number, 2)
    return Pairs(chosen=both.select(first), rejected=both.select(first + 1))


def make_actor(bench: Bench, name: str, tokens: int | None, pairs: int, recompute: str = "none") -> Any:
    """The actor as a recipe builds it: AdamW, sigmoid loss, bf16 with fp32 sums."""
    from rlxf.config.roles import LoraConfig, LossConfig, OptimizerConfig
    from rlxf.models.batching import MicroBatchLimits
    from rlxf.update import OBJECTIVES
    from rlxf.update.actor import ActorSettings, MegatronActor
    from rlxf.update.objective import ObjectiveContext, ObjectiveSettings

    model = load(bench, bench.folder(name), torch.bfloat16, recompute)
    limits = MicroBatchLimits(num_sequences=8, num_tokens=tokens)
    settings = ObjectiveSettings(config=LossConfig(), offline=True, margin_weight=0.0, has_reference=True)
    objective = OBJECTIVES["preference"](settings, ObjectiveContext(model=model, limits=limits))
    optimizer = OptimizerConfig(ppo_mini_batch_size=pairs, lr=1e-6)
    return MegatronActor(
        model,
        objective,
        ActorSettings(optimizer=optimizer, lora=LoraConfig(), limits=limits, num_steps=10, seed=1, bucket_bytes=2**28),
    )


def referenced(pairs: Pairs) -> ReferencedPairs:
    sums = [-10.0 * side.completion_lengths.float() for side in (pairs.chosen, pairs.rejected)]
    return ReferencedPairs(pairs=pairs, reference=PairValues(chosen=sums[0], rejected=sums[1]))


def model_flops(shape: Shape, pairs: Pairs) -> tuple[int, float]:
    """Tokens that the model computes for some pairs, a shared prompt once, and the operations of a training step.

    ``6 * (body * tokens + head * completion tokens) + 12 * layers * heads * head size * (query, key) pairs``: forward
    and backward of all matrices, and of causal attention the pairs that are seen. What is computed again in backward
    does not count.
    """
    tokens, rows, seen = 0, 0, 0
    for i in range(len(pairs)):
        prompt = int(pairs.chosen.prompt_lengths[i])
        tokens += prompt
        seen += prompt * (prompt + 1) // 2
        for side in (pairs.chosen, pairs.rejected):
            length = int(side.completion_lengths[i])
            rows += length
            tokens += length - 1
            seen += (length - 1) * prompt + (length - 1) * length // 2
    matrices = 6 * (shape.body * tokens + shape.head * rows)
    return tokens, float(matrices + 12 * shape.layers * shape.hidden * seen)


CASES: dict[str, tuple[int | None, str]] = {  # token budget of a pass, and recompute
    "8192 tokens a pass": (8192, "none"),
    "16384 tokens a pass": (16384, "none"),
    "4 pairs a pass": (None, "none"),
    "8192 tokens a pass, recompute full": (8192, "full"),
}


def training(bench: Bench) -> dict[str, Any]:
    """Optimizer steps of the 1B-shaped model in bf16 through ``MegatronActor.update``."""
    number, found = 4 if bench.small else 32, dict[str, Any]()
    pairs = make_pairs(bench, number, bench.shape("1b").vocab)
    for case in list(CASES)[: 1 if bench.quick else None]:
        free(bench)
        try:
            found[case] = train(bench, pairs, *CASES[case])
        except torch.OutOfMemoryError as error:
            found[case] = f"out of memory: {str(error)[:120]}"
    return found


def train(bench: Bench, pairs: Pairs, budget: int | None, recompute: str) -> dict[str, Any]:
    actor = make_actor(bench, "1b", budget, len(pairs), recompute)
    batch, rows, steps = referenced(pairs), torch.arange(len(pairs)), iter(range(20))
    tokens, flops = model_flops(bench.shape("1b"), pairs)

    def accumulate() -> None:
        actor._accumulate(actor.objective.mini_batch(batch, rows, first_pass=True), rows, 0)

    seconds = timed(bench, lambda: actor.update(batch, next(steps)), repeats=5, warm_up=2)
    without_step = timed(bench, accumulate, repeats=3, warm_up=0)
    passes = len(actor._micro_batches(actor.objective.mini_batch(batch, rows, first_pass=True)))
    found = {
        "tokens": tokens,
        "passes": passes,
        "s_per_step": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak_flops(bench),
        "optimizer_s": seconds - without_step,
        "peak_gib": bench.platform.max_memory_allocated() / 2**30,
    }
    return found | profile(bench, lambda: actor.update(batch, next(steps)))


def profile(bench: Bench, call: Callable[[], object]) -> dict[str, Any]:
    """Of one optimizer step: seconds that kernels ran, which took the most, and before which the device was idle."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as profiler

    activities = supported_activities() - {ProfilerActivity.CPU}
    if bench.is_cpu or not activities:
        return {}
    bench.platform.synchronize()
    with profiler(activities=activities) as seen:
        call()
        bench.platform.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name) for e in seen.events() if e.device_type != DeviceType.CPU
    )
    busy: collections.Counter[str] = collections.Counter()
    idle: collections.Counter[str] = collections.Counter()
    longest: list[tuple[float, str]] = []
    end = spans[0][0]
    for start, stop, name in spans:
        busy[name[:90]] += stop - start
        if start > end:
            idle[name[:90]] += start - end
            longest.append((start - end, name[:90]))
        end = max(end, stop)
    return {
        "kernel_s": sum(busy.values()) / 1e6,
        "idle_s": sum(idle.values()) / 1e6,
        "launches": len(spans),
        "top_kernels": [[name, round(spent / 1e6, 4)] for name, spent in busy.most_common(30)],
        "idle_before": [[name, round(spent / 1e6, 4)] for name, spent in idle.most_common(12)],
        "longest_idle": [[name, round(spent / 1e6, 4)] for spent, name in sorted(longest, reverse=True)[:30]],
    }


def syncs(bench: Bench) -> dict[str, Any]:
    """How often the host waits for the device in one micro-batch, forward and backward, and in an optimizer step."""
    free(bench)
    shape, found = bench.shape("1b"), dict[str, Any]()
    actor = make_actor(bench, "1b", 8192, 4)
    batch, rows = referenced(make_pairs(bench, 4, shape.vocab)), torch.arange(4)
    actor.update(batch, 0)
    with counted_syncs(bench) as packing:
        batches = actor._micro_batches(actor.objective.mini_batch(batch, rows, first_pass=False))
    from rlxf.update.actor import _forward

    size = len(actor.objective.sums) + len(actor.objective.maxima)
    with counted_syncs(bench) as passes:
        actor.trainable.accumulate(_forward, batches, size)
    with counted_syncs(bench) as step:
        actor.trainable.step(1e-6)
    for name, counts in (("packing", packing), ("forward and backward", passes), ("optimizer step", step)):
        found[name] = {
            "syncs": sum(counts.values()), "per_layer": sum(counts.values()) / shape.layers,
            "micro_batches": len(batches), "where": [list(item) for item in counts.most_common(12)],
        }  # fmt: skip
    return found


def sampling(bench: Bench) -> dict[str, Any]:
    """The HF engine at 1B in bf16: tokens per second, sampled and greedy."""
    free(bench)
    from benchmarks.device_numbers import TINY
    from rlxf.core.types import PromptBatch, Tokens
    from rlxf.rollout.engine import EngineSettings, Sampling
    from rlxf.rollout.hf import HfEngine

    number, length = (2, 4) if bench.small else (32, 32)
    engine = HfEngine(
        EngineSettings(model=str(bench.folder("1b")), tokenizer=str(TINY / "sft"), dtype="bfloat16", max_length=1024),
        bench.platform,
    )
    draw = torch.Generator().manual_seed(0)
    prompts = Tokens.from_rows(
        [torch.randint(2, bench.shape("1b").vocab, (100,), generator=draw).tolist() for _ in range(number)]
    )
    batch = PromptBatch(
        prompts=prompts, row_ids=torch.arange(number), positions=torch.arange(number), texts=("",) * number, columns={}
    )
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        wanted = Sampling(num_samples=2, max_new_tokens=length, temperature=temperature)
        tokens = int(engine.generate(batch, wanted).sequences.completion_lengths.sum())
        seconds = timed(bench, partial(engine.generate, batch, wanted), repeats=1, warm_up=0)
        found[name] = {
            "rows": 2 * number,
            "tokens_per_s": tokens / seconds,
            "ms_per_token_step": 1e3 * seconds / length,
        }
    return found


def weights(bench: Bench) -> dict[str, Any]:
    """All weights of the 1B-shaped model from one process into another one's: through handles, and through the host."""
    if bench.is_cpu:
        return {"note": "needs a device whose memory two processes can share"}
    from benchmarks.device_weights import measure_weights

    return measure_weights(bench)


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "ceiling": ceiling,
    "head": head,
    "syncs": syncs,
    "training": training,
    "sampling": sampling,
    "weights": weights,
}
