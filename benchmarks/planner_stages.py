"""The part of planner.py that compares stages: predicted and measured CPU seconds of real models, in one or two ranks.

A case is a recipe and lengths. Its stages run as the product's own roles in processes of one thread; what they cost is
the CPU time of all ranks. A device of the planner is the core that was probed in the same process, just before.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world  # noqa: E402 - the root must be importable first
from benchmarks import sides as world_sides  # noqa: E402
from rlxf.planner.device import Device  # noqa: E402
from rlxf.planner.jobs import Work, jobs_of  # noqa: E402
from rlxf.planner.time import ADV, GEN, REF, UPDATE, Stage, stages_of  # noqa: E402

SHAPES = {
    "26M": random_world.Shape(hidden=512, layers=8, ffn=1408, heads=8, kv_heads=2, vocab=6400),
    "2.5M": random_world.SIZES["2.5M"],
}
STAGES = (GEN, ADV, REF, UPDATE)
SAMPLES = 2
MANY_CORES = 64  # so that no rank waits for a core: CPU seconds are compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A recipe and the lengths of its step."""

    name: str
    size: str = "26M"
    prompts: int = 8
    prompt_tokens: tuple[int, int] = (16, 64)  # shortest and longest
    completion_tokens: int = 64  # mean
    workload: str = "fixed"  # or lognormal
    budget: int | None = 2048  # tokens of a pass
    micro_batch: int = 1  # pairs of a pass, without a budget
    tp: int = 1
    dp: int = 1
    fits: tuple[str, ...] = ()  # stages whose seconds give the device's shares
    barred: bool = True  # its predictions must be within the bar

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def longest(self) -> int:
        return self.completion_tokens if self.workload == "fixed" else 4 * self.completion_tokens

    def lengths(self) -> world_sides.Work:
        """Of its completions."""
        return world_sides.Work(
            workloads=(self.workload,), prompts=self.prompts, mean_tokens=self.completion_tokens,
            max_new_tokens=self.longest,
        )  # fmt: skip

    def prompt_rows(self) -> list[list[int]]:
        draw = np.random.default_rng(0)
        vocab = SHAPES[self.size].vocab
        sizes = draw.integers(*self.prompt_tokens, size=self.prompts, endpoint=True)
        return [draw.integers(2, vocab, size=size).tolist() for size in sizes]

    def work(self) -> Work:
        """What the planner is told of it."""
        lengths = self.lengths().lengths(0)
        return Work(
            prompts=self.prompts,
            samples=SAMPLES,
            prompt_tokens=float(np.mean([len(row) for row in self.prompt_rows()])),
            completion_tokens=float(lengths.mean()),
            longest=float(lengths.max() / lengths.mean()),
            pairs=float(self.prompts),
        )

    def recipe(self, world: random_world.World) -> dict[str, Any]:
        limits = {"max_tokens_per_micro_batch": self.budget, "micro_batch_size": self.micro_batch}
        length = self.prompt_tokens[1] + self.longest
        role = {
            "model": "random", "load": str(world.policy), "seq_length": length,
            "tensor_model_parallel_size": self.tp, **limits,
        }  # fmt: skip
        pool = [self.ranks]
        return {
            "runtime": "ray",  # whose roles may have several ranks
            "training": {"stage": "ray_online_dpo", "device": "cpu", "global_batch_size": self.prompts},
            "model": {"random": world.shape.section()},
            "actor_rollout": {
                **role, "data_path": str(world.prompts), "max_prompt_length": self.prompt_tokens[1],
                "max_new_tokens": self.longest, "n_samples_per_prompt": SAMPLES, "num_gpus_for_infer": 1,
                "num_gpus_for_train": self.ranks,
                "ppo_mini_batch_size": -(-self.prompts // self.dp),
            },
            "ref": role,
            "reward": {**role, "load": str(world.reward)},
            "rollout": {"engine": "hf", "gpu_memory_utilization": 0.5},
            "resource_pool": {"actor_rollout": [self.ranks + 1], "ref": pool, "reward": pool},
        }  # fmt: skip


CASES = (
    Case(name="fit: 2048 tokens a pass", fits=(GEN, REF, UPDATE)),
    Case(name="fit: one pair a pass", prompts=4, budget=None, fits=(UPDATE,)),
    Case(name="fit: two rows", prompts=1, fits=(GEN,)),
    Case(name="long: 192 tokens, 4096 a pass", prompts=4, prompt_tokens=(64, 192), completion_tokens=192, budget=4096),
    Case(name="lognormal lengths", workload="lognormal"),
    Case(name="two pairs a pass", prompts=6, completion_tokens=96, budget=None, micro_batch=2),
    Case(name="DP2", dp=2),
    Case(name="TP2", tp=2),
    Case(name="2.5M", size="2.5M", barred=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """CPU seconds of a case's stages, of all ranks together, and figures of the core; one of each per repeat."""

    seconds: Mapping[str, Sequence[float]]
    figures: Mapping[str, Sequence[float]]

    def device(self, shares: Mapping[str, float]) -> Device:
        found = {key: statistics.median(values) for key, values in self.figures.items()}
        return Device.load("cpu").with_figures("probe", "", **found, **shares).with_cores(MANY_CORES)

    def median(self, stage: str) -> float:
        return statistics.median(self.seconds[stage])


def run(cases: Sequence[Case], worlds: Mapping[str, random_world.World], repeats: int) -> dict[str, Measured]:
    """Each case measured; cases of the same ranks in the same processes, one after the other."""
    found: dict[str, Measured] = {}
    layouts = dict.fromkeys((case.tp, case.dp) for case in cases)
    for tp, dp in layouts:
        mine = [case for case in cases if (case.tp, case.dp) == (tp, dp)]
        for case, ranks in zip(mine, _on_ranks(mine, worlds, tp * dp, repeats), strict=True):
            seconds = {
                stage: [sum(values) for values in zip(*(rank["seconds"][stage] for rank in ranks), strict=True)]
                for stage in ranks[0]["seconds"]
            }
            found[case.name] = Measured(seconds=seconds, figures=ranks[0]["figures"])
    return found


def again(cases: Mapping[str, Any]) -> dict[str, Measured]:
    """What ``compare`` wrote of earlier measurements."""
    return {
        name: Measured(
            seconds={stage: found["measured_s"] for stage, found in case["stages"].items()},
            figures={key: [value] for key, value in case["figures"].items()},
        )
        for name, case in cases.items()
    }


def _on_ranks(
    cases: Sequence[Case], worlds: Mapping[str, random_world.World], number: int, repeats: int
) -> list[list[dict[str, Any]]]:
    """For each case what each rank found."""
    from tests.ports import free_port

    context, port = multiprocessing.get_context("spawn"), free_port()
    os.environ.update(measure.environment())
    connections, processes = list[Connection](), []
    for rank in range(number):
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rank, number, port, cases, worlds, repeats))
        process.start()
        theirs.close()
        connections.append(mine)
        processes.append(process)
    try:
        return [[connection.recv() for connection in connections] for _ in cases]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _serve(
    connection: Connection, rank: int, number: int, port: int, cases: Sequence[Case],
    worlds: Mapping[str, random_world.World], repeats: int,
) -> None:  # fmt: skip
    warnings.filterwarnings("ignore")
    import torch

    from rlxf.platform import Process

    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=number, master_port=port)
    for case in cases:
        connection.send(_measure(case, worlds[case.size], process, repeats))


def _measure(case: Case, world: random_world.World, process: Any, repeats: int) -> dict[str, Any]:
    from rlxf.platform.probe import probe_cpu

    stages = _stages(case, world, process)
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    figures: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        probe_cpu.cache_clear()
        for key, value in probe_cpu().items():
            figures.setdefault(key, []).append(value)
        for stage, call in stages.items():
            begin = time.process_time()
            answer = call(repeat)
            if stage == GEN:
                assert int(answer.sequences.completion_lengths.sum()) == int(case.lengths().lengths(0).sum())
            if repeat:  # the first one makes kernels and takes memory
                seconds[stage].append(time.process_time() - begin)
    return {"seconds": seconds, "figures": figures}


def _stages(case: Case, world: random_world.World, process: Any) -> dict[str, Callable[[int], Any]]:
    """The product's roles on this rank; the engine only where there is one rank."""
    import torch

    from rlxf.assembly.roles import build_actor, build_engine, build_reference, limits_of, load_role
    from rlxf.config.load import load_config
    from rlxf.core.types import Pairs, PromptBatch, ReferencedPairs, Sequences, Tokens
    from rlxf.models.backend import sequence_scores
    from rlxf.platform import get_platform
    from rlxf.rollout.engine import Sampling

    config, platform = load_config(case.recipe(world)), get_platform("cpu")
    rows, lengths = case.prompt_rows(), case.lengths().lengths(0)
    draw = np.random.default_rng(1)
    completions = [draw.integers(2, world.shape.vocab, size=length).tolist() for length in lengths.flatten()]
    whole = Sequences.from_rows([row for row in rows for _ in range(SAMPLES)], completions)
    first = torch.arange(0, len(whole), SAMPLES)
    pairs = Pairs(chosen=whole.select(first), rejected=whole.select(first + 1))
    actor, reference = build_actor(config, platform, process), build_reference(config, platform, process)
    reward = load_role(config, "reward", platform, process)
    values = reference.logps(pairs)
    found: dict[str, Callable[[int], Any]] = {}
    if process.world_size == 1:
        engine: Any = build_engine(config, platform)
        fixed = case.workload == "fixed"
        if fixed:
            engine._eos_ids = ()  # every completion is as long as it may be
        else:
            world_sides.fix_lengths(case.lengths())  # of what is sampled to train
        number = torch.arange(case.prompts)
        batch = PromptBatch(
            prompts=Tokens.from_rows(rows), row_ids=number, positions=number, texts=("",) * case.prompts, columns={}
        )
        sampling = Sampling(num_samples=SAMPLES, max_new_tokens=case.longest, purpose="eval" if fixed else "train")
        found[GEN] = lambda repeat: engine.generate(batch, sampling)
    return found | {
        ADV: lambda repeat: sequence_scores(reward, whole, limits_of(config.reward)),
        REF: lambda repeat: reference.logps(pairs),
        UPDATE: lambda repeat: actor.update(ReferencedPairs(pairs=pairs, reference=values), repeat),
    }


def predicted(case: Case, world: random_world.World, device: Device) -> dict[str, Stage]:
    """The planner's stages of a case."""
    from rlxf.config.load import load_config

    return stages_of(jobs_of(load_config(case.recipe(world))), device, case.work())


def core_seconds(stage: Stage) -> float:
    """CPU seconds of all ranks."""
    return stage.seconds * stage.devices


def fit(
    cases: Sequence[Case], measured: Mapping[str, Measured], worlds: Mapping[str, random_world.World]
) -> dict[str, float]:
    """``decode_share``, ``memory_share``, ``train_share``, ``pass_ms`` and ``forward_share`` from the cases that fit.

    Seconds are about linear in the inverse of a share and in an overhead, so two cases give both. What a token costs
    besides its products and bytes cannot be told from the bytes with one model, and stays as it is in the file.
    """
    shares = {"decode_share": 0.8, "memory_share": 0.6, "train_share": 0.7, "pass_ms": 0.3, "forward_share": 0.7}

    def solve(stage: str, share: str, overhead: str | None) -> None:
        for _ in range(4):  # an overhead that would be negative is cut
            keys = [share] if overhead is None else [share, overhead]
            used = [case for case in cases if stage in case.fits][: len(keys)]
            base = {case.name: _core(case, stage, measured, worlds, shares) for case in used}
            slopes = np.zeros((len(keys), len(keys)))
            for column, key in enumerate(keys):
                moved = _moved(shares, key, 1.02)
                for line, case in enumerate(used):
                    change = _core(case, stage, measured, worlds, moved) - base[case.name]
                    slopes[line, column] = change / (_argument(moved, key) - _argument(shares, key))
            missing = np.array([measured[case.name].median(stage) - base[case.name] for case in used])
            for key, change in zip(keys, np.linalg.lstsq(slopes, missing, rcond=None)[0], strict=True):
                shares.update(_set(key, max(_argument(shares, key) + float(change), 1e-3)))

    for _ in range(3):  # the prompts of a sampling need the share of a forward pass
        solve(GEN, "decode_share", "memory_share")
        solve(UPDATE, "train_share", "pass_ms")
        solve(REF, "forward_share", None)
    return shares


def _core(
    case: Case, stage: str, measured: Mapping[str, Measured], worlds: Mapping[str, random_world.World],
    shares: Mapping[str, float],
) -> float:  # fmt: skip
    return core_seconds(predicted(case, worlds[case.size], measured[case.name].device(shares))[stage])


def _argument(shares: Mapping[str, float], key: str) -> float:
    """That in which seconds are linear."""
    return shares[key] if key.endswith("_ms") else 1 / shares[key]


def _set(key: str, argument: float) -> dict[str, float]:
    return {key: argument if key.endswith("_ms") else 1 / argument}


def _moved(shares: Mapping[str, float], key: str, factor: float) -> dict[str, float]:
    return {**shares, **_set(key, _argument(shares, key) * factor)}


def compare(
    cases: Sequence[Case], measured: Mapping[str, Measured], worlds: Mapping[str, random_world.World],
    shares: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Predicted over measured CPU seconds of every stage of every case."""
    found: dict[str, Any] = {}
    for case in cases:
        core = measured[case.name]
        plans = predicted(case, worlds[case.size], core.device(shares))
        found[case.name] = {
            "barred": case.barred and not case.fits,
            "ranks": case.ranks,
            "figures": {key: statistics.median(values) for key, values in core.figures.items()},
            "stages": {
                stage: {
                    "measured_s": list(values),
                    "predicted_s": core_seconds(plans[stage]),
                    "ratio": core_seconds(plans[stage]) / statistics.median(values),
                }
                for stage, values in core.seconds.items()
            },
        }
    return found


def worst(report: Mapping[str, Any]) -> tuple[str, float]:
    """Name and error of the stage that is furthest off, of the cases with a bar."""
    errors = {
        f"{name}, {stage}": abs(found["ratio"] - 1)
        for name, case in report.items() if case["barred"] for stage, found in case["stages"].items()
    }  # fmt: skip
    name = max(errors, key=lambda key: errors[key])
    return name, errors[name]
