"""Sampling beside training: wall and CPU seconds of a step on two cores, with and without lookahead, and TRL's.

    python benchmarks/lookahead.py                     # -> results/lookahead.json
    python benchmarks/lookahead.py --sizes 26M --workloads fixed --sides k0 k1

Random Llamas of 2.5M and 26M parameters, 8 prompts of 16 to 64 tokens per step, 2 samples each of 64 tokens, or of
lognormal lengths (sigma 0.8, mean 64, at most 256). ``k0``, ``k1``, ``k2`` are four roles on Ray with vLLM, one thread
each, and ``rollout.lookahead`` 0, 1, 2; ``trl`` is TRL's live ``OnlineDPOTrainer`` with two threads. The tiny recipe is
measured with k0 and k1 only. All programs are loaded at the same time and take turns of several steps; the first two
turns of each do not count. A turn ends when nothing of its program is under way.

The bound of a step is half its own CPU seconds: two cores that are never idle.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.against_trl import spread  # noqa: E402
from benchmarks.ray_overhead import UNCOUNTED_TURNS, measure_turns  # noqa: E402
from benchmarks.sides import Ours, Recipe, Trl, Work, run_ours, run_recipe, run_trl  # noqa: E402
from benchmarks.turns import Program, Turn  # noqa: E402

STEPS_PER_TURN = {"tiny": 16, "2.5M": 12, "26M": 4}
SIDES = ("k0", "k1", "k2", "trl")
WORKLOADS = ("fixed", "lognormal")
CORES = 2


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {"repeats": arguments.repeats, "results": {}, "machine": measure.machine()}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        for size in arguments.sizes:
            for workload in arguments.workloads if size != "tiny" else ["recipe"]:
                print(f"{size}, {workload}", flush=True)
                made = programs(size, workload, arguments, Path(scratch, f"{size}_{workload}"))
                found = measure_turns(made, arguments.repeats)
                report["results"][f"{size}, {workload}"] = summarize(found, STEPS_PER_TURN[size])
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program that count")
    parser.add_argument("--sizes", nargs="+", choices=tuple(STEPS_PER_TURN), default=["26M", "2.5M", "tiny"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["k0", "k1", "trl"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lookahead.json")
    return parser.parse_args()


def programs(size: str, workload: str, arguments: argparse.Namespace, folder: Path) -> list[Program]:
    steps = STEPS_PER_TURN[size]
    made = []
    if size == "tiny":
        subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    else:
        world = random_world.build(folder / "world", size)
        most = 64 if workload == "fixed" else 256
        work = Work(workloads=(workload,), steps_per_turn=steps, max_new_tokens=most)
    for name in arguments.sides:
        settings: Any
        target: Any
        if size == "tiny":
            if name == "trl":
                continue
            count = steps * (UNCOUNTED_TURNS + arguments.repeats + 1)
            overrides = (f"training.train_iters={count}", "training.eval_interval=0", f"rollout.lookahead={name[1:]}")
            settings = Recipe(name="online_dpo_trainer_tiny", runtime="ray", engine="vllm", overrides=overrides)
            target = run_recipe
        elif name == "trl":
            settings, target = Trl(world=world, work=work, threads=CORES), run_trl
        else:
            ahead = (("rollout", "lookahead", int(name[1:])),)
            settings = Ours(world=world, work=work, runtime="ray", engine="vllm", overrides=ahead)
            target = run_ours
        made.append(Program(name=name, target=target, settings=settings, folder=folder / name, steps_per_turn=steps))
    return made


def summarize(found: Mapping[str, list[Turn]], steps: int) -> dict[str, Any]:
    """Ratios compare turns of the same number, whose steps are the same work."""
    result: dict[str, Any] = {}
    for name, counted in found.items():
        result[name] = {
            "wall_s_per_step": spread([turn.wall_s / steps for turn in counted]),
            "cpu_s_per_step": spread([turn.cpu_s / steps for turn in counted]),
            "wall_over_bound": spread([turn.wall_s / (turn.cpu_s / CORES) for turn in counted]),
        }
        for other, kind in (("k0", "wall_s"), ("k0", "cpu_s"), ("trl", "wall_s")):
            if other in found:
                pairs = zip(found[other], counted, strict=True)
                ratios = [getattr(b, kind) / getattr(a, kind) for a, b in pairs]
                if other == "trl":
                    ratios = [1 / ratio for ratio in ratios]
                key = {"k0wall_s": "wall_of_k0", "k0cpu_s": "cpu_of_k0", "trlwall_s": "times_trl"}[other + kind]
                result[name][key] = spread(ratios)
    return result


def table(report: Mapping[str, Any]) -> Iterator[str]:
    columns = (
        "wall s per step",
        "CPU s per step",
        "wall / (CPU / 2)",
        "wall, of k0",
        "CPU, of k0",
        "times TRL's speed",
    )
    yield "| model, workload | program | " + " | ".join(columns) + " |"
    yield "|---" * 8 + "|"
    for title, sides in report["results"].items():
        for name, side in sides.items():
            keys = ("wall_s_per_step", "cpu_s_per_step", "wall_over_bound", "wall_of_k0", "cpu_of_k0", "times_trl")
            yield f"| {title} | {name} | " + " | ".join(_cell(side.get(key)) for key in keys) + " |"


def _cell(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    return f"{statistics.median(values['turns']):.3f} ({values['min']:.3f}-{values['max']:.3f})"


if __name__ == "__main__":
    main()
