"""What more samples give a judged run: the tiny world with a judge that is wrong in 15 % of its verdicts.

    python benchmarks/judged_pairs.py                     # results/judged_pairs.json
    python benchmarks/judged_pairs.py --seeds 1 --samples 2

A step has 64 completions, of 32 prompts with 2 samples, of 16 with 4, or of 8 with 8: the cost of sampling is equal.
The judge compares all completions of a prompt with each other. ``best_worst`` makes one pair of a prompt, ``all`` every
pair that has a winner. All runs are in one process with the Hugging Face engine. Runs that the result file holds are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.tiny_learning import evaluations  # noqa: E402
from rlxf.observe.formulas import read_jsonl  # noqa: E402

RECIPE = "online_dpo_trainer_tiny_judge"
RESULTS = ROOT / "benchmarks" / "results" / "judged_pairs.json"
SHOWN = ("positive", "win_truth", "valid", "kl", "win_rate", "length")
COMPLETIONS = 64  # of a step
PAIRINGS = ("best_worst", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8], help="completions of a prompt")
    parser.add_argument("--pairings", nargs="+", choices=PAIRINGS, default=PAIRINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for seed, samples, pairing in product(arguments.seeds, arguments.samples, arguments.pairings):
        if samples == 2 and pairing == "all":
            continue  # the same pairs
        name = f"{samples} {pairing} {seed}"
        if name not in found:
            found[name] = run(samples, pairing, seed)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(name, {key: round(found[name]["last"][key], 3) for key in SHOWN}, flush=True)
    print("\n".join(("", *table(found))))


def run(samples: int, pairing: str, seed: int) -> dict[str, Any]:
    """The first and the last evaluation of a run, its pairs and questions a step, and its CPU seconds."""
    overrides = (
        f"actor_rollout.n_samples_per_prompt={samples}",
        f"training.global_batch_size={COMPLETIONS // samples}",
        f"algorithm.pairing={pairing}",
        f"training.seed={seed}",
        *("judge.tournament=all", "runtime=local", "eval.greedy=false", "log.tensorboard=false"),
    )
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        folder = Path(scratch, "run")
        seconds = measure.run(RECIPE, *overrides, run_dir=folder).samples[-1].cpu_s
        first, *_, last = evaluations(folder)
        steps = read_jsonl(folder / "metrics.jsonl")
    means = {key: fmean(step[key] for step in steps) for key in ("pair/kept", "judge/asked")}
    return {"first": first, "last": last, "means": means, "cpu_s": seconds}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """A row for each number of samples and pairing: means over the seeds, and the smallest value."""
    yield "| samples | pairing | pairs a step | questions a step | " + " | ".join(SHOWN) + " |"
    yield "|---" * (4 + len(SHOWN)) + "|"
    kinds = dict.fromkeys(tuple(name.split()[:2]) for name in found)
    for samples, pairing in sorted(kinds, key=lambda kind: (int(kind[0]), kind[1] != "best_worst")):
        runs = [value for name, value in found.items() if name.split()[:2] == [samples, pairing]]
        means = [fmean(one["means"][key] for one in runs) for key in ("pair/kept", "judge/asked")]
        values = [[one["last"][key] for one in runs] for key in SHOWN]
        cells = [f"{fmean(of):.3f} ({min(of):.3f}-{max(of):.3f})" for of in values]
        yield f"| {samples} | {pairing} | {means[0]:.0f} | {means[1]:.0f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
