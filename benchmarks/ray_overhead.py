"""What Ray costs: whole steps with four roles as Ray actors, against the same calls in one process.

    python benchmarks/ray_overhead.py                  # -> results/ray_overhead.json

The same recipe, seeds and Hugging Face engine on both sides, so both compute the same; the product's own layout, Ray
with vLLM, stands beside them. The tiny size is the shipped recipe ``online_dpo_trainer_tiny``; the others are random
Llamas with 8 prompts of 16 to 64 tokens and 2 samples of 64 tokens per step. The programs take turns; the first two
turns of each do not count. Roles work one after the other, one thread each.
"""

from __future__ import annotations

import argparse
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
from benchmarks.sides import Ours, Recipe, Work, run_ours, run_recipe  # noqa: E402
from benchmarks.turns import Program, Turn  # noqa: E402

STEPS_PER_TURN = {"tiny": 8, "2.5M": 4, "26M": 2}
UNCOUNTED_TURNS = 2  # the first updates are probed, and memory is allocated
RUNTIMES = {"local_hf": ("local", "hf"), "ray_hf": ("ray", "hf"), "ray_vllm": ("ray", "vllm")}


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {"repeats": arguments.repeats, "sizes": {}, "machine": measure.machine()}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        for size in arguments.sizes:
            made = programs(size, arguments, Path(scratch, size))
            found = measure_turns(made, arguments.repeats)
            report["sizes"][size] = summarize(found, STEPS_PER_TURN[size])
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each program that count")
    parser.add_argument("--sizes", nargs="+", choices=tuple(STEPS_PER_TURN), default=["tiny", "26M"])
    parser.add_argument("--sides", nargs="+", choices=tuple(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ray_overhead.json")
    return parser.parse_args()


def programs(size: str, arguments: argparse.Namespace, folder: Path) -> list[Program]:
    steps = STEPS_PER_TURN[size]
    made = []
    if size == "tiny":
        subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    else:
        world = random_world.build(folder / "world", size)
        work = Work(workloads=("fixed",), steps_per_turn=steps, max_new_tokens=64)
    for name in arguments.sides:
        runtime, engine = RUNTIMES[name]
        settings: Ours | Recipe
        target: Any
        if size == "tiny":
            iterations = max(80, steps * (UNCOUNTED_TURNS + arguments.repeats) + 1)  # 80: the recipe's own
            overrides = (f"training.train_iters={iterations}", "training.eval_interval=0")
            settings = Recipe(name="online_dpo_trainer_tiny", runtime=runtime, engine=engine, overrides=overrides)
            target = run_recipe
        else:
            settings, target = Ours(world=world, work=work, runtime=runtime, engine=engine), run_ours
        made.append(Program(name=name, target=target, settings=settings, folder=folder / name, steps_per_turn=steps))
    return made


def measure_turns(made: list[Program], repeats: int) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {program.name: [] for program in made}
    with turns.running(made):
        for program in turns.in_turn(made, UNCOUNTED_TURNS + repeats, 1):
            turn = program.turn()
            found[program.name].append(turn)
            steps = program.steps_per_turn
            print(f"  {program.name}: {turn.wall_s / steps:.3f} s, {turn.cpu_s / steps:.3f} CPU s per step", flush=True)
    return {name: all_turns[UNCOUNTED_TURNS:] for name, all_turns in found.items()}


def summarize(found: Mapping[str, list[Turn]], steps: int) -> dict[str, Any]:
    """Per side; ``more_than_local`` compares turns of the same number, whose steps are the same work."""
    base = found.get("local_hf", [])
    return {
        name: {
            "wall_s_per_step": spread([turn.wall_s / steps for turn in counted]),
            "cpu_s_per_step": spread([turn.cpu_s / steps for turn in counted]),
            "wall_more_than_local": spread([t.wall_s / b.wall_s - 1 for t, b in zip(counted, base, strict=True)])
            if base
            else None,
        }
        for name, counted in found.items()
    }


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| model | program | wall s per step (min-max) | CPU s per step (min-max) | wall, more than local (min-max) |"
    yield "|---|---|---|---|---|"
    for size, sides in report["sizes"].items():
        for name, side in sides.items():
            wall, cpu = (
                f"{c['median']:.3f} ({c['min']:.3f}-{c['max']:.3f})"
                for c in (side["wall_s_per_step"], side["cpu_s_per_step"])
            )
            more = side["wall_more_than_local"]
            extra = f"{more['median']:+.0%} ({more['min']:+.0%} to {more['max']:+.0%})" if more else "-"
            yield f"| {size} | {name} | {wall} | {cpu} | {extra} |"


if __name__ == "__main__":
    main()
