"""What off-policy samples cost: the tiny recipe with sampling k steps ahead of training, for four losses.

    python benchmarks/staleness.py                       # results/staleness.json
    python benchmarks/staleness.py --losses ipo --ahead 0 1 --seeds 1

Step s trains on samples of the weights of step s - k (``rollout.lookahead=k``), exactly. All runs are in one process
with the Hugging Face engine, so a result depends on nothing but recipe and seed. Runs that the result file holds are
not repeated. ``--plot FILE`` draws quality against k.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.online_losses import SHOWN  # noqa: E402
from benchmarks.tiny_learning import RECIPE, evaluations  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "staleness.json"
# The quick start's recipe; a loss whose scale is another one gets its own beta or rate, the same for every k.
SETTINGS: dict[str, tuple[str, ...]] = {
    "sigmoid": (),
    "ipo": (),
    "hinge": (),
    "simpo": ("actor_rollout.dpo_beta=2.0", "actor_rollout.simpo_gamma=0.5", "actor_rollout.lr=3e-4"),
}
AHEAD = (0, 1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
REPEATS = 4  # samples of each evaluation prompt


def main() -> None:
    arguments = parse()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        prompts = Path(scratch, "eval.jsonl")
        prompts.write_text((ROOT / "models" / "tiny" / "eval_prompts.jsonl").read_text() * REPEATS)
        wanted = [
            (f"{loss} {ahead} {seed}", loss, ahead, seed)
            for seed, ahead, loss in product(arguments.seeds, arguments.ahead, arguments.losses)
        ]
        missing = [item for item in wanted if item[0] not in found]
        runs = pool.map(
            lambda item: (item[0], run(*item[1:], prompts, Path(scratch, item[0].replace(" ", "_")))), missing
        )
        for name, row in runs:
            found[name] = row
            print(name, {key: round(row[key], 3) for key in SHOWN}, flush=True)
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print("\n".join(("", *table(found))))
    if arguments.plot:
        plot(found, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--ahead", type=int, nargs="+", default=AHEAD)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at the same time")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def run(loss: str, ahead: int, seed: int, prompts: Path, run_dir: Path) -> dict[str, float]:
    """The last evaluation of one run."""
    overrides = (
        f"actor_rollout.dpo_loss_type={loss}",
        *SETTINGS[loss],
        f"rollout.lookahead={ahead}",
        f"training.seed={seed}",
        f"eval.data_path={prompts}",
        f"eval.num_prompts={256 * REPEATS}",
        *("runtime=local", "training.eval_interval=100", "eval.greedy=false", "log.tensorboard=false"),
    )
    measure.run(RECIPE, *overrides, run_dir=run_dir)
    return evaluations(run_dir)[-1]


def table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """For each loss and k the mean over the seeds, and the worst where more than one is there."""
    yield "| loss | k | seeds | positive | win (truth) | valid | KL, nats |"
    yield "|---" * 7 + "|"
    for loss, ahead in product(SETTINGS, AHEAD):
        rows = [row for name, row in found.items() if name.split()[:2] == [loss, str(ahead)]]
        if rows:
            cells = [_cell([row[key] for row in rows], min) for key in ("positive", "win_truth", "valid")]
            cells.append(_cell([row["kl"] for row in rows], max, digits=1))
            yield f"| {loss} | {ahead} | {len(rows)} | " + " | ".join(cells) + " |"


def _cell(values: list[float], worst: Any, digits: int = 3) -> str:
    return f"{fmean(values):.{digits}f} ({worst(values):.{digits}f})"


def plot(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Positive and valid texts against k, a line for each loss."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharex=True)
    for axis, key in zip(axes, ("positive", "valid"), strict=True):
        for loss in SETTINGS:
            points = {
                ahead: [row[key] for name, row in found.items() if name.split()[:2] == [loss, str(ahead)]]
                for ahead in AHEAD
            }
            known = {ahead: values for ahead, values in points.items() if values}
            axis.plot([*known], [fmean(values) for values in known.values()], marker="o", label=loss)
        axis.set_xlabel("k, steps that sampling is ahead")
        axis.set_title(key)
        axis.set_ylim(0, 1)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
