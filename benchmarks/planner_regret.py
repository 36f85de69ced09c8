"""The part of planner.py that compares layouts: seconds of a step of real runs, and which one the planner takes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.measure import num_rows  # noqa: E402
from benchmarks.planner_stages import SHAPES  # noqa: E402
from benchmarks.sides import SAMPLES, Ours, run_ours  # noqa: E402
from benchmarks.sides import Work as Lengths  # noqa: E402
from rlxf.observe.formulas import read_jsonl  # noqa: E402
from rlxf.planner.device import Device  # noqa: E402
from rlxf.planner.jobs import Jobs, Work, jobs_of  # noqa: E402
from rlxf.planner.time import pace, stages_of  # noqa: E402

SIZE = "26M"
LENGTHS = Lengths(workloads=("fixed",), prompts=8, mean_tokens=64, max_new_tokens=64)
SKIPPED = 1  # steps: the first one makes kernels and takes memory
Keys = tuple[tuple[str, str, Any], ...]  # section, key, value


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A way to run the recipe on this machine."""

    name: str
    train: int = 1
    infer: int = 1
    score: int = 1  # processes of the reference, and of the reward model
    tp: int = 1  # of the trainer
    lookahead: int = 0
    budget: int | None = 2048
    colocate: tuple[str, ...] = ()
    local: bool = False

    def side(self, world: random_world.World) -> Ours:
        shares = {"train", "infer"} <= set(self.colocate)
        actor = max(self.train, self.infer) if shares else self.train + self.infer
        every = ("actor_rollout", "ref", "reward")
        limits: Keys = tuple((role, "max_tokens_per_micro_batch", self.budget) for role in every)
        small: Keys = () if self.budget else tuple((role, "micro_batch_size", 1) for role in every)
        keys: Keys = (
            ("actor_rollout", "num_gpus_for_train", self.train),
            ("actor_rollout", "num_gpus_for_infer", self.infer),
            ("actor_rollout", "tensor_model_parallel_size", self.tp),
            ("actor_rollout", "ppo_mini_batch_size", LENGTHS.prompts * self.tp // self.train),
            ("resource_pool", "actor_rollout", [actor]),
            ("resource_pool", "ref", [self.score]),
            ("resource_pool", "reward", [self.score]),
            ("resource_pool", "colocate", list(self.colocate)),
            ("rollout", "lookahead", self.lookahead),
            ("rollout", "gpu_memory_utilization", 0.5),
        )
        runtime = "local" if self.local else "ray"
        return Ours(world=world, work=LENGTHS, runtime=runtime, engine="hf", overrides=limits + small + keys)


LAYOUTS = (
    Layout(name="one process", local=True),
    Layout(name="one process, one pair a pass", local=True, budget=None),
    Layout(name="four roles"),
    Layout(name="four roles, one ahead", lookahead=1),
    Layout(name="four roles, one ahead, one pair a pass", lookahead=1, budget=None),
    Layout(name="train DP2", train=2),
    Layout(name="train DP2, two engines", train=2, infer=2),
    Layout(name="all roles twice", train=2, infer=2, score=2),
    Layout(name="train TP2, two engines", train=2, infer=2, tp=2),
    Layout(name="train DP2, two engines, one ahead", train=2, infer=2, lookahead=1),
    Layout(name="train and infer share one", colocate=("train", "infer")),
    Layout(name="all share two", train=2, infer=2, score=2, colocate=("train", "infer", "ref", "reward")),
)


def run(layouts: Sequence[Layout], folder: Path, steps: int, device: Device) -> dict[str, Any]:
    """Predicted and measured seconds of a step of each layout."""
    world = random_world.build(folder / "world", SHAPES[SIZE])
    found: dict[str, Any] = {}
    for number, layout in enumerate(layouts):
        plan = predicted(layout, world, device)
        print(f"{layout.name}: {plan['step_s']:.2f} s predicted", flush=True)
        found[layout.name] = plan | measured(layout, world, folder / str(number), steps)
        print(f"{layout.name}: {found[layout.name]['measured_s']:.2f} s measured", flush=True)
    return found


def measured(layout: Layout, world: random_world.World, folder: Path, steps: int) -> dict[str, Any]:
    """Wall seconds of the steps of a run, and CPU seconds of all its processes."""
    program = turns.Program(
        name=layout.name, target=run_ours, settings=layout.side(world), folder=folder, steps_per_turn=steps
    )
    with turns.running([program]):
        turn = program.turn()
    run_folder = folder / "run"
    assert num_rows(run_folder) >= steps
    rows = [float(row["timing/all"]) for row in read_jsonl(run_folder / "metrics.jsonl")[SKIPPED:steps]]
    return {"measured_s": statistics.median(rows), "steps_s": rows, "cpu_s_per_step": turn.cpu_s / steps}


def predicted(layout: Layout, world: random_world.World, device: Device) -> dict[str, Any]:
    """The planner's seconds of a step, and of its stages."""
    from rlxf.config.load import load_config

    jobs: Jobs = jobs_of(load_config(layout.side(world).recipe()))
    stages = stages_of(jobs, device, work())
    step = pace(jobs, stages, lookahead=jobs.lookahead, streams=jobs.chunks > 1, cores=device.cores)
    return {"step_s": step.seconds, "stages_s": {name: stage.seconds for name, stage in stages.items()}}


def work() -> Work:
    low, high = random_world.PROMPT_LENGTHS
    return Work(
        prompts=LENGTHS.prompts, samples=SAMPLES, prompt_tokens=(low + high) / 2,
        completion_tokens=float(LENGTHS.mean_tokens), pairs=float(LENGTHS.prompts),
    )  # fmt: skip


def regret(found: Mapping[str, Any]) -> dict[str, Any]:
    """How much slower the planner's first choice is than the fastest layout, and whether the orders agree."""
    names = list(found)
    first = min(names, key=lambda name: found[name]["step_s"])
    best = min(names, key=lambda name: found[name]["measured_s"])
    return {
        "first_choice": first,
        "fastest": best,
        "regret": found[first]["measured_s"] / found[best]["measured_s"] - 1,
        "rank_correlation": _spearman(
            [found[name]["step_s"] for name in names], [found[name]["measured_s"] for name in names]
        ),
    }


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks; nan with fewer than three layouts."""
    if len(first) < 3:
        return float("nan")
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*[[float(rank) for rank in line] for line in ranks])
