"""Idle engines at the end of a step's sampling, by who samples which prompt.

    python benchmarks/dispatch.py                        # -> results/dispatch.json
    python benchmarks/dispatch.py --parts stubs costs    # without the models
    python benchmarks/dispatch.py --most 4096            # hardly any completion is cut

A step has 256 prompts of 16 to 64 tokens, 2 completions of each and 4 engines. Completions have lognormal lengths
(sigma 0.8, mean 64, at most 256). A prompt's mean length in the last epoch and in this one correlate 0.7, so the two
completions of a prompt are alike, too. The idle share is 1 - (mean time of the engines) / (time of the last one).

- ``today``: contiguous shares of equal size.
- ``planned, no history``: ``deal`` by the prompts' own lengths.
- ``planned, history``: ``deal`` by the lengths that the last epoch gave (``SeenLengths``).
- ``queue``, without and with history: each engine takes the next prompt when it has room for its completions.
- ``planned, real lengths``: ``deal`` by lengths that no plan can know. Like the others it counts prompt tokens, too.

The stub engines are a model of slots: a decode step lasts a + b * (busy rows), prompts cost nothing, and a slot is
filled again at once. The real ones are HF engines with a random Llama, one after the other in one process, with their
CPU seconds; lengths are forced. There the queue hands out calls of ``--per-call`` prompts.

Bound: the lengths that the best linear forecast from the last epoch leaves open, if what it expects were spread
perfectly evenly and only busy rows cost time.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.random_world import PROMPT_LENGTHS  # noqa: E402
from benchmarks.sides import end_at  # noqa: E402
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Tokens  # noqa: E402
from rlxf.rollout.dispatch import deal  # noqa: E402
from rlxf.rollout.engine import EngineSettings, Sampling, sample_seed  # noqa: E402
from rlxf.rollout.lengths import SeenLengths  # noqa: E402
from rlxf.rollout.shares import join, part_of  # noqa: E402

ENGINES, UNLIMITED = 4, 1_000_000
SLOTS = {"16": 16, "64": 64, "unlimited": UNLIMITED}
COSTS = {"only rows": 0, "a = 16 b": 16, "a = 160 b": 160}  # a of a decode step, in units of b
HISTORY, NONE, TODAY, REAL = "planned, history", "planned, no history", "today", "planned, real lengths"
QUEUED = {"queue, no history": NONE, "queue, history": HISTORY}

TINY = random_world.Shape(hidden=96, layers=2, ffn=256, heads=3, kv_heads=3, vocab=512)
SIZES = {"tiny": TINY, **random_world.SIZES}

Lengths = NDArray[np.int64]  # [prompts, samples] tokens of each completion
Shares = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    prompts: int = 256
    samples: int = 2
    sigma: float = 0.8
    mean: int = 64
    most: int = 256
    correlation: float = 0.7

    def draw(self, generator: np.random.Generator, prompts: int, alike: float) -> tuple[Lengths, Lengths]:
        """Lengths of two epochs; ``alike``: the share of the logarithms' variance that is the prompt's."""
        of_prompt = np.sqrt(alike) * generator.standard_normal((prompts, 1))
        median = np.log(self.mean) - self.sigma**2 / 2
        epochs = []
        for _ in range(2):
            noise = np.sqrt(1 - alike) * generator.standard_normal((prompts, self.samples))
            lengths = np.exp(median + self.sigma * (of_prompt + noise)).round()
            epochs.append(np.clip(lengths, 1, self.most).astype(np.int64))
        return epochs[0], epochs[1]

    def alike(self) -> float:
        """So that the means of two epochs correlate as they should: found by bisection over many prompts."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            found = correlation(*self.draw(np.random.default_rng(0), 200_000, middle))
            low, high = (middle, high) if found < self.correlation else (low, middle)
        return (low + high) / 2


def correlation(last: Lengths, now: Lengths) -> float:
    return float(np.corrcoef(last.mean(axis=1), now.mean(axis=1))[0, 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One draw: the prompts, what they gave in the last epoch, and what they give now."""

    prompts: PromptBatch
    last: Lengths
    now: Lengths

    def work(self, known: str) -> list[float]:
        """What ``deal`` is told."""
        seen = SeenLengths()
        if known != NONE:
            seen.add(rollouts(self.prompts, self.last if known == HISTORY else self.now))
        return seen.work(self.prompts, self.now.shape[1])

    def shares(self, name: str, slots: int) -> Shares:
        if name == TODAY:
            return [part.tolist() for part in np.array_split(np.arange(len(self.now)), ENGINES)]
        dealt = deal(
            self.work(name),
            ENGINES,
            slots_per_engine=slots,
            samples_per_prompt=self.now.shape[1],
            chunk=None,
            mode="planned",
        )
        assert dealt.shares is not None
        return dealt.shares

    def order(self, known: str) -> Sequence[int]:
        samples = self.now.shape[1]
        work = self.work(known)
        return deal(work, ENGINES, slots_per_engine=1, samples_per_prompt=samples, chunk=None, mode="queue").order

    def bound(self) -> float:
        """See the module."""
        last, now = self.last.sum(axis=1), self.now.sum(axis=1)
        slope = np.cov(last, now)[0, 1] / last.var(ddof=1)
        forecast = now.mean() + slope * (last - last.mean())
        plan = deal(
            list(forecast), ENGINES, slots_per_engine=1, samples_per_prompt=2, chunk=None, mode="planned"
        ).shares
        assert plan is not None
        return idle([forecast.sum() / ENGINES + (now - forecast)[list(share)].sum() for share in plan])


def steps(work: Workload, count: int) -> Iterator[Step]:
    generator, alike = np.random.default_rng(1), work.alike()
    for _ in range(count):
        last, now = work.draw(generator, work.prompts, alike)
        lengths = generator.integers(PROMPT_LENGTHS[0], PROMPT_LENGTHS[1], work.prompts, endpoint=True)
        yield Step(prompts=prompt_batch(lengths), last=last, now=now)


def prompt_batch(lengths: NDArray[np.int64]) -> PromptBatch:
    draw = np.random.default_rng(int(lengths.sum()))
    return PromptBatch(
        prompts=Tokens(
            tokens=torch.from_numpy(draw.integers(2, 500, int(lengths.sum())).astype(np.int32)),
            lengths=torch.from_numpy(lengths),
        ),
        row_ids=torch.arange(len(lengths)),
        positions=torch.arange(len(lengths)),
        texts=("",) * len(lengths),
        columns={},
    )


def rollouts(prompts: PromptBatch, lengths: Lengths) -> Rollouts:
    """Completions of these lengths, without any content."""
    own = prompts.prompts.lengths.repeat_interleave(lengths.shape[1])
    flat = torch.from_numpy(lengths.reshape(-1))
    return Rollouts(
        prompts=prompts,
        sequences=Sequences(
            tokens=torch.zeros(int((own + flat).sum()), dtype=torch.int32), lengths=own + flat, prompt_lengths=own
        ),
        prompt_index=torch.arange(len(prompts)).repeat_interleave(lengths.shape[1]),
        sample_index=torch.arange(lengths.shape[1]).repeat(len(prompts)),
        engine_logps=torch.zeros(int(flat.sum())),
        policy_version=torch.zeros(len(flat), dtype=torch.int64),
    )


def idle(times: Sequence[float]) -> float:
    return 1 - float(np.mean(times)) / max(times)


class StubEngine:
    """Slots under a clock of its own; a decode step lasts ``a + busy rows``."""

    def __init__(self, slots: int, a: float) -> None:
        self.now = 0.0
        self._slots, self._a = slots, a
        self._steps = 0  # decode steps made
        self._ends: list[int] = []  # decode step with which each busy slot ends, as a heap
        self._waiting: deque[int] = deque()

    def add(self, lengths: Sequence[int]) -> None:
        self._waiting.extend(lengths)
        self._fill()

    def room(self) -> int:
        return self._slots - len(self._ends) - len(self._waiting)

    def next_end(self) -> float:
        """When the next completion ends; infinity without any."""
        if not self._ends:
            return float("inf")
        return self.now + (self._ends[0] - self._steps) * (self._a + len(self._ends))

    def advance(self) -> None:
        self.now = self.next_end()
        self._steps = heapq.heappop(self._ends)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._ends) < self._slots:
            heapq.heappush(self._ends, self._steps + self._waiting.popleft())


def times_of_shares(shares: Shares, lengths: Lengths, slots: int, a: float) -> list[float]:
    found = []
    for share in shares:
        engine = StubEngine(slots, a)
        engine.add(lengths[list(share)].reshape(-1).tolist())
        while engine.next_end() < float("inf"):
            engine.advance()
        found.append(engine.now)
    return found


def times_of_queue(order: Sequence[int], lengths: Lengths, slots: int, a: float) -> list[float]:
    engines, left, samples = [StubEngine(slots, a) for _ in range(ENGINES)], deque(order), lengths.shape[1]
    while left and any(engine.room() >= samples for engine in engines):  # at the start they take turns
        for engine in engines:
            if left and engine.room() >= samples:
                engine.add(lengths[left.popleft()].tolist())
    while (engine := min(engines, key=StubEngine.next_end)).next_end() < float("inf"):
        engine.advance()
        while left and engine.room() >= samples:
            engine.add(lengths[left.popleft()].tolist())
    return [engine.now for engine in engines]


def stubs(work: Workload, draws: int) -> dict[str, Any]:
    found: dict[tuple[str, str, str], list[float]] = {}
    bounds, correlations = [], []
    for step in steps(work, draws):
        bounds.append(step.bound())
        correlations.append(correlation(step.last, step.now))
        orders = {name: step.order(known) for name, known in QUEUED.items()}
        for slots_name, slots in SLOTS.items():
            plans = {name: step.shares(name, slots) for name in (TODAY, NONE, HISTORY, REAL)}
            for cost, a in COSTS.items():
                for name, shares in plans.items():
                    key = (cost, slots_name, name)
                    found.setdefault(key, []).append(idle(times_of_shares(shares, step.now, slots, a)))
                for name, order in orders.items():
                    key = (cost, slots_name, name)
                    found.setdefault(key, []).append(idle(times_of_queue(order, step.now, slots, a)))
    return {
        "draws": draws,
        "correlation": statistics.fmean(correlations),
        "bound": spread(bounds),
        "idle": [
            {"cost": cost, "slots": slots, "dispatch": name, **spread(values)}
            for (cost, slots, name), values in found.items()
        ],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.05, 0.95))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "p05": float(low), "p95": float(high)}


class ForcedLengths:
    """Gives the HF engine's completions the lengths of a step, by their seeds."""

    def __init__(self, sampling: Sampling) -> None:
        from rlxf.rollout import hf_sampling

        lengths = self._lengths = dict[int, int]()
        self._sampling = sampling

        class Forced(hf_sampling.Sampler):
            def __init__(self, seeds: Sequence[int], *others: Any) -> None:
                super().__init__(seeds, *others)
                self._ends = torch.tensor([lengths[seed] for seed in seeds])
                self._made = torch.zeros(len(seeds), dtype=torch.int64)

            def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
                left = self._ends[rows] - self._made[rows]
                self._made[rows] += 1
                return super().choose(end_at(logits, left, 0), rows)

        hf_sampling.Sampler = Forced  # type: ignore[misc, assignment]

    def of(self, step: Step) -> None:
        places = zip(step.prompts.positions.tolist(), step.prompts.row_ids.tolist(), step.now.tolist(), strict=True)
        for position, row, lengths in places:
            for sample, length in enumerate(lengths):
                seed = sample_seed(self._sampling, position=position, prompt_id=row, sample_index=sample)
                self._lengths[seed] = length


def real_engines(work: Workload, size: str, draws: int, per_call: int, folder: Path) -> dict[str, Any]:
    """Idle shares by CPU seconds of each engine's calls."""
    from rlxf.platform import PLATFORMS
    from rlxf.rollout.hf import HfEngine

    world = random_world.build(folder, SIZES[size], num_prompts=1)
    sampling = Sampling(num_samples=work.samples, max_new_tokens=work.most)
    settings = EngineSettings(
        model=str(world.policy), tokenizer=str(world.policy), dtype="float32", max_length=PROMPT_LENGTHS[1] + work.most
    )
    forced, engine = ForcedLengths(sampling), HfEngine(settings, PLATFORMS["cpu"]())
    found: dict[tuple[str, str], list[float]] = {}

    def seconds(step: Step, rows: Sequence[int]) -> float:
        begin = time.process_time()
        done = engine.generate(step.prompts.select(list(rows)), sampling)
        cpu_s = time.process_time() - begin
        assert done.sequences.completion_lengths.tolist() == step.now[list(rows)].reshape(-1).tolist()
        return cpu_s

    for number, step in enumerate(steps(work, draws + 1)):
        forced.of(step)
        if number == 0:  # does not count: caches, allocations
            seconds(step, range(16))
            continue
        by_calls = f"{per_call} prompts a call"
        for name in (TODAY, NONE, HISTORY):
            shares = step.shares(name, UNLIMITED)
            found.setdefault(("all at once", name), []).append(idle([seconds(step, share) for share in shares]))
            calls = [_calls(share, per_call) for share in step.shares(name, per_call * work.samples)]
            times = [sum(seconds(step, rows) for rows in share) for share in calls]
            found.setdefault((by_calls, name), []).append(idle(times))
        for name, known in QUEUED.items():
            times = [0.0] * ENGINES
            for rows in _calls(step.order(known), per_call):
                first = times.index(min(times))
                times[first] += seconds(step, rows)
            found.setdefault((by_calls, name), []).append(idle(times))
        print(f"step {number} of {draws} with models", flush=True)
    shown = [{"slots": slots, "dispatch": name, **spread(values)} for (slots, name), values in found.items()]
    return {"draws": draws, "size": size, "idle": shown}


def _calls(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def costs(repeats: int) -> dict[str, float]:
    """CPU ms of one call in the driver's process, the best of some."""
    million, draw = 1_000_000, np.random.default_rng(0)
    batch = prompt_batch(draw.integers(*PROMPT_LENGTHS, 4096))
    rows = torch.from_numpy(draw.permutation(million)[:4096])
    done = rollouts(replace(batch, row_ids=rows), draw.integers(1, 256, (4096, 2)))
    seen, every = SeenLengths(), prompt_batch(np.ones(million, dtype=np.int64))
    seen.add(rollouts(every, draw.integers(1, 256, (million, 1))))
    work = seen.work(done.prompts, 2)
    dealt = deal(work, 64, slots_per_engine=64, samples_per_prompt=2, chunk=64, mode="planned")
    parts = [part_of(done, share) for share in dealt.shares or ()]
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        folder = Path(scratch)
        seen.save(folder)
        calls: dict[str, Callable[[], object]] = {
            "deal, 64 engines, 4096 prompts": lambda: deal(
                work, 64, slots_per_engine=64, samples_per_prompt=2, chunk=64, mode="planned"
            ),
            "SeenLengths.add, 4096 of 1,000,000 prompts": lambda: seen.add(done),
            "SeenLengths.work, the same": lambda: seen.work(done.prompts, 2),
            "SeenLengths.save, 1,000,000 prompts": lambda: seen.save(folder),
            "SeenLengths.load, 1,000,000 prompts": lambda: SeenLengths.load(folder),
            "join, 64 parts, 8192 completions": lambda: join(done.prompts, parts),
            "part_of, 64 times": lambda: [part_of(done, chunk) for chunk in dealt.chunks],
        }
        return {name: best_ms(call, repeats) for name, call in calls.items()}


def best_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(1000 * (time.process_time() - begin))
    return min(times)


def table(report: dict[str, Any]) -> Iterator[str]:
    names = (TODAY, NONE, HISTORY, *QUEUED, REAL)
    if "stubs" in report:
        bound = report["stubs"]["bound"]
        yield f"stub engines, {report['stubs']['draws']} draws; bound with history: {_share(bound)}"
        yield from _rows(names, report["stubs"]["idle"], ("cost", "slots"))
    if "models" in report:
        yield f"\nHF engines, {report['models']['size']}, CPU seconds, {report['models']['draws']} draws"
        yield from _rows(names[:-1], report["models"]["idle"], ("slots",))
    for name, cost in report.get("costs", {}).items():
        yield f"{name}: {cost:.2f} CPU ms"


def _rows(names: Sequence[str], found: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[str]:
    yield f"| {', '.join(keys)} | " + " | ".join(names) + " |"
    yield "|---" * (1 + len(names)) + "|"
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in found):
        cells = {row["dispatch"]: _share(row) for row in found if tuple(row[name] for name in keys) == key}
        yield f"| {', '.join(key)} | " + " | ".join(cells.get(name, "-") for name in names) + " |"


def _share(values: dict[str, Any]) -> str:
    return f"{100 * values['mean']:.1f} % (sd {100 * values['deviation']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("stubs", "models", "costs")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--draws", type=int, default=400, help="steps of the stub engines")
    parser.add_argument("--repeats", type=int, default=5, help="steps of the models, and calls whose cost is measured")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--per-call", type=int, default=8, help="prompts that an HF engine samples at the same time")
    parser.add_argument("--most", type=int, default=256, help="tokens of the longest completion")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "dispatch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Workload(most=arguments.most)
    report: dict[str, Any] = {"workload": {name: getattr(work, name) for name in work.__slots__}}
    if "stubs" in arguments.parts:
        report["stubs"] = stubs(work, arguments.draws)
    if "costs" in arguments.parts:
        report["costs"] = costs(arguments.repeats)
    if "models" in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
            world = Path(scratch, "world")
            report["models"] = real_engines(work, arguments.size, arguments.repeats, arguments.per_call, world)
    report["machine"] = measure.machine()
    turns.write_results(arguments.output, report, table(report))


if __name__ == "__main__":
    main()
