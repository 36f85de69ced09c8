"""A thousand steps on fixed completions, here and in TRL: both loss curves, and how far apart they are.

    python benchmarks/trl_parity.py    # writes results/trl_parity.json and ../docs/images/trl_parity.png

Both sides start from the same tiny Llama in fp32, read the same completions and scores, and train with AdamW at 1e-5.
Ours runs through the product's own entry point (``rollout.engine=replay runtime=local``) and is read from its
``metrics.jsonl``; TRL's ``OnlineDPOTrainer`` runs live, only its sampler replaced by the recorded completions
(``tests/parity/trl_online.py``). The curves themselves go into a .csv beside the .json.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the repository's root must be importable first
import torch  # noqa: E402

from tests.parity import oracle, ours, trl_online  # noqa: E402
from tests.parity.fixed_data import (  # noqa: E402
    Settings,
    best_first,
    make_fixed_data,
    save_policy_and_reference,
    steps_of,
)

# Read off the reference implementation's own figure of this experiment, which names neither model nor precision.
REFERENCE_MEAN_ERROR, REFERENCE_PEAK = 2.65e-3, 5.7e-2
GOAL = 1e-5


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    settings = Settings(
        num_steps=arguments.steps, pairs_per_step=8, micro_batch_size=8, lr=1e-5, beta=0.1, max_new_tokens=32
    )
    rows = make_fixed_data(settings.num_steps * settings.pairs_per_step, max_new_tokens=settings.max_new_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, _ = save_policy_and_reference(folder)  # as in the seed's experiment, the policy starts at the reference
        theirs = trl_online.train(rows, policy, policy, settings, folder)
        pairs = steps_of([best_first(row, penalty=settings.missing_eos_penalty) for row in rows], settings)
        plain = oracle.train(pairs, policy, policy, settings)
        recipe = ours.online_recipe(rows, policy, policy, settings, folder)
        mine = ours.run_entry_point(recipe, folder / "run", timeout_s=3600)
    sides = {"rlxf": mine, "trl": theirs, "plain_torch": plain}
    curves = {name: [step["loss"] for step in steps] for name, steps in sides.items()}
    report = summarize(curves, settings)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    write_curves(curves, arguments.output.with_suffix(".csv"))
    plot(curves, report, arguments.plot)
    print(json.dumps(report, indent=1))
    if report["loss_error"]["mean"] >= GOAL:
        raise SystemExit(f"mean loss error {report['loss_error']['mean']:.3g}, expected below {GOAL:.0e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/trl_parity.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/trl_parity.png")
    return parser.parse_args()


def summarize(curves: dict[str, list[float]], settings: Settings) -> dict[str, Any]:
    return {
        "steps": settings.num_steps,
        "settings": {name: getattr(settings, name) for name in settings.__slots__},
        "loss_error": spread(curves["rlxf"], curves["trl"]),
        "loss_error_of_plain_torch": spread(curves["plain_torch"], curves["trl"]),  # what rounding alone does
        "reference_implementation": {"mean": REFERENCE_MEAN_ERROR, "max": REFERENCE_PEAK},
        "loss": {name: {"first": curve[0], "last_tenth": tail_mean(curve)} for name, curve in curves.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
        "machine": f"{platform.machine()}, one thread, fp32",
    }


def spread(curve: list[float], truth: list[float]) -> dict[str, float]:
    error = np.abs(np.subtract(curve, truth))  # [steps]
    return {
        "mean": float(error.mean()),
        "median": float(np.median(error)),
        "max": float(error.max()),
        "mean_of_last_tenth": tail_mean(error.tolist()),
    }


def tail_mean(curve: list[float]) -> float:
    return float(np.mean(curve[-max(1, len(curve) // 10) :]))


def write_curves(curves: dict[str, list[float]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        writer.writerows([step, *values] for step, values in enumerate(zip(*curves.values(), strict=True), start=1))


def plot(curves: dict[str, list[float]], report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    upper.plot(curves["trl"], color="tab:blue", linewidth=1.4, label="TRL OnlineDPOTrainer")
    upper.plot(curves["rlxf"], color="tab:orange", linewidth=0.7, linestyle="--", label="rlxf")
    upper.set_ylabel("loss")
    upper.legend()
    upper.set_title("Online DPO on fixed completions: tiny Llama, fp32, AdamW, lr 1e-5")
    error = np.abs(np.subtract(curves["rlxf"], curves["trl"]))
    lower.semilogy(np.maximum(error, 1e-9), ".", markersize=2, color="tab:green")  # equal losses sit on the floor
    lower.axhline(report["loss_error"]["mean"], color="tab:green", label=f"mean {report['loss_error']['mean']:.1e}")
    lower.axhline(
        REFERENCE_MEAN_ERROR, color="tab:red", label=f"reference implementation's mean {REFERENCE_MEAN_ERROR:.2e}"
    )
    lower.set_ylabel("|difference|")
    lower.set_xlabel("step")
    lower.set_ylim(5e-10, 1)
    lower.legend(fontsize="small", loc="upper right", ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
