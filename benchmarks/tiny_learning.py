"""Does it learn? The shipped tiny recipe for several seeds, every evaluation of each, against the bars of the project.

    python benchmarks/tiny_learning.py                    # Ray and vLLM, seeds 1 to 10: results/tiny_learning.json
    python benchmarks/tiny_learning.py --runtime local    # one process, Hugging Face engine
    python benchmarks/tiny_learning.py --recipe online_dpo_trainer_tiny_lora

Each evaluation asks every prompt four times, each time with another seed (``--repeats``). With one sample for each of
the 256 prompts the standard error of a reading of .94 is .015, which is as large as the differences between seeds.

What comes after ``--`` goes to ``ray_gpt.py`` as it is, for example ``-- actor_rollout.lr=5e-4``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from rlxf.observe.formulas import read_jsonl  # noqa: E402

RECIPE, LORA = "online_dpo_trainer_tiny", "online_dpo_trainer_tiny_lora"
SHOWN = ("positive", "win_truth", "valid", "kl", "reward", "win_rate", "eos_rate", "length")  # of eval/*
SEEDS = {RECIPE: range(1, 11), LORA: range(1, 4)}
# Bars for the last evaluation of every seed. Read them together: a policy that gets a high score with text that is no
# longer in the grammar has failed.
AT_LEAST = {
    RECIPE: {"positive": 0.95, "win_truth": 0.91, "valid": 0.82},
    # Adapters do not train the embedding, which is also the head. Most of the gain of a full run comes from there.
    LORA: {"positive": 0.55, "win_truth": 0.55, "valid": 0.6},
}
AT_MOST = {RECIPE: {"kl": 8.0}, LORA: {"kl": 9.0}}
# Bars for the mean. They apply if at least as many seeds ran as the recipe has; a mean of fewer says too little.
MEAN_AT_LEAST = {RECIPE: {"positive": 0.97, "win_truth": 0.94, "valid": 0.88}, LORA: {}}

Evaluation = Mapping[str, float]


def main() -> None:
    arguments = parse()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        if arguments.repeats > 1:
            arguments.overrides = [*arguments.overrides, *repeated_prompts(Path(scratch, "eval.jsonl"), arguments)]
        runs = {seed: run_seed(seed, Path(scratch, str(seed)), arguments) for seed in arguments.seeds}
    report = summarize(runs, arguments)
    print_table(report)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {arguments.output}")
    if not report["passed"] and not arguments.steps:
        sys.exit("a bar was missed: " + "; ".join(report["missed"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=(RECIPE, LORA), default=RECIPE)
    parser.add_argument("--runtime", choices=("ray", "local"), default="ray", help="ray rolls out with vLLM")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 to 10, with adapters 1 to 3")
    parser.add_argument("--steps", type=int, help="instead of the recipe's; then no bar is enforced")
    parser.add_argument("--repeats", type=int, default=4, help="samples per prompt of an evaluation")
    parser.add_argument("--output", type=Path, help="default: results/tiny_learning.json, or ..._local.json")
    parser.add_argument("overrides", nargs="*", help="for ray_gpt.py, after --")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or [*SEEDS[arguments.recipe]]
    parts = [
        "tiny_learning",
        "lora" if arguments.recipe == LORA else "",
        "local" if arguments.runtime == "local" else "",
    ]
    name = "_".join(part for part in parts if part) + ".json"
    arguments.output = arguments.output or ROOT / "benchmarks" / "results" / name
    return arguments


def repeated_prompts(path: Path, arguments: argparse.Namespace) -> list[str]:
    """The overrides that evaluate on every prompt of the tiny world ``--repeats`` times, with the file they need."""
    prompts = (ROOT / "models" / "tiny" / "eval_prompts.jsonl").read_text()
    path.write_text(prompts * arguments.repeats)
    return [f"eval.data_path={path}", f"eval.num_prompts={len(prompts.splitlines()) * arguments.repeats}"]


def run_seed(seed: int, run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = [f"training.seed={seed}", f"runtime={arguments.runtime}", *arguments.overrides]
    if arguments.steps:
        overrides.append(f"training.train_iters={arguments.steps}")
    print(f"seed {seed}: {arguments.recipe} {' '.join(overrides)}", flush=True)
    done = measure.run(arguments.recipe, *overrides, run_dir=run_dir)
    found = evaluations(run_dir)
    return {
        "evaluations": found,
        "missed": [f"seed {seed}: {line}" for line in missed(found[-1], arguments.recipe)],
        "losses": [row.get("loss") for row in done.steps],
        "wall_s": round(done.wall_s, 2),
        "cpu_s": round(done.cpu_s, 2),
        "outside_steps_s": round(done.outside_s, 2),
        "load_before": done.load,
    }


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    """Every evaluation of a run: ``step``, and the values of ``eval/*`` without that prefix."""
    rows = read_jsonl(run_dir / "eval.jsonl")
    found = [{name.removeprefix("eval/"): value for name, value in row.items() if name != "answers"} for row in rows]
    summary = json.loads((run_dir / "summary.json").read_text())["end"]
    assert all(summary[f"eval/{name}"] == value for name, value in found[-1].items() if name != "step")
    return found


def missed(evaluation: Evaluation, recipe: str = RECIPE) -> list[str]:
    """The bars that an evaluation does not reach, each with its value."""
    low = [
        f"{name} {evaluation[name]:.3f}, at least {bar}"
        for name, bar in AT_LEAST[recipe].items()
        if evaluation[name] < bar
    ]
    high = [
        f"{name} {evaluation[name]:.3f}, at most {bar}"
        for name, bar in AT_MOST[recipe].items()
        if evaluation[name] > bar
    ]
    return low + high


def missed_means(last: Sequence[Evaluation], recipe: str = RECIPE) -> list[str]:
    """The bars that the mean over the seeds' last evaluations does not reach; none of fewer seeds than the recipe's."""
    if len(last) < len(SEEDS[recipe]):
        return []
    means = {name: fmean(evaluation[name] for evaluation in last) for name in MEAN_AT_LEAST[recipe]}
    return [
        f"mean {name} {means[name]:.4f}, at least {bar}"
        for name, bar in MEAN_AT_LEAST[recipe].items()
        if means[name] < bar
    ]


def summarize(runs: Mapping[int, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    steps = [int(row["step"]) for row in next(iter(runs.values()))["evaluations"]]
    over_seeds = {
        step: {
            name: {"min": min(values), "mean": fmean(values), "max": max(values)}
            for name in SHOWN
            for values in [[run["evaluations"][index][name] for run in runs.values()]]
        }
        for index, step in enumerate(steps)
    }
    missed_bars = [line for run in runs.values() for line in run["missed"]]
    missed_bars += missed_means([run["evaluations"][-1] for run in runs.values()], arguments.recipe)
    return {
        "recipe": arguments.recipe,
        "runtime": arguments.runtime,
        "overrides": [word for word in arguments.overrides if not word.startswith("eval.data_path=")],
        "repeats": arguments.repeats,
        "bars": {
            "at_least": AT_LEAST[arguments.recipe],
            "at_most": AT_MOST[arguments.recipe],
            "mean_at_least": MEAN_AT_LEAST[arguments.recipe],
        },
        "passed": not missed_bars,
        "missed": missed_bars,
        "over_seeds": over_seeds,
        "seeds": runs,
        "machine": measure.machine(),
    }


def print_table(report: Mapping[str, Any]) -> None:
    for line in table(report):
        print(line)


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| step | seed | " + " | ".join(SHOWN) + " |"
    yield "|---" * (2 + len(SHOWN)) + "|"
    for seed, run in report["seeds"].items():
        for row in run["evaluations"]:
            yield _row(int(row["step"]), str(seed), [f"{row[name]:.3f}" for name in SHOWN])
    for step, values in report["over_seeds"].items():
        yield _row(step, "min-max", [f"{values[name]['min']:.3f}-{values[name]['max']:.3f}" for name in SHOWN])
        yield _row(step, "mean", [f"{values[name]['mean']:.3f}" for name in SHOWN])
    bars = report["bars"]
    worst = {name: f">= {bar}" for name, bar in bars["at_least"].items()}
    worst |= {name: f"<= {bar}" for name, bar in bars["at_most"].items()}
    yield _row("last", "bar of each", [worst.get(name, "") for name in SHOWN])
    mean = {name: f">= {bar}" for name, bar in bars["mean_at_least"].items()}
    yield _row("last", "bar of the mean", [mean.get(name, "") for name in SHOWN])
    for seed, run in report["seeds"].items():
        yield f"seed {seed}: {run['wall_s']:.0f} s wall, {run['cpu_s']:.0f} s CPU"


def _row(step: int | str, seed: str, cells: Sequence[str]) -> str:
    return f"| {step} | {seed} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
