"""Online against offline DPO on the tiny world: the same number of updates, the same policy, reward model and settings.

    python benchmarks/online_offline.py              # seeds 1 2 3; results/online_offline.json
    python benchmarks/online_offline.py --plot       # docs/images/online_offline.svg from the results

The offline arm trains on pairs that the first policy sampled and the reward model ranked, each seen about once: the
strongest fair opponent. Both arms save their policy every ten updates, and every policy is measured in the same way:
one completion at temperature 1 for each of 256 held-out prompts, its ground truth, and its summed log-ratio to the
first policy (KL). Nothing is timed, so a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from rlxf.tools.tiny import truth  # noqa: E402

WORLD = ROOT / "models" / "tiny"
RESULTS = ROOT / "benchmarks" / "results" / "online_offline.json"
PLOT = ROOT / "docs" / "images" / "online_offline.svg"
ARMS = {"online": "online_dpo_trainer_tiny", "offline": "offline_dpo_trainer_tiny"}
SHOWN = ("positive", "win_truth", "valid", "kl", "eos_rate")
KL_BANDS = ((1.0, 2.5), (2.5, 4.0), (4.0, 6.0), (6.0, 9.0), (9.0, 15.0))
EVERY = 10  # updates between two measurements
SETTINGS = (
    "runtime=local",
    "training.eval_interval=0",
    f"training.save_hf_interval={EVERY}",
    "actor_rollout.dpo_beta=0.1",
    "actor_rollout.lr=5e-4",
    "actor_rollout.min_lr=0",
    "actor_rollout.lr_decay_style=constant",
    "actor_rollout.lr_warmup_iters=5",
    "log.tensorboard=false",
)

Point = dict[str, float]


def main() -> None:
    arguments = parse()
    if not arguments.plot:
        subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
        report = {
            "settings": SETTINGS,
            "steps": arguments.steps,
            "arms": {arm: [run_arm(arm, seed, arguments.steps) for seed in arguments.seeds] for arm in ARMS},
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {RESULTS}")
    found = json.loads(RESULTS.read_text())
    for line in (*by_updates(found), "", *by_kl(found)):
        print(line)
    plot(found, PLOT)
    print(f"\nwritten: {PLOT}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100, help="updates of each run")
    parser.add_argument("--plot", action="store_true", help="run nothing: draw the stored results")
    return parser.parse_args()


def run_arm(arm: str, seed: int, steps: int) -> list[Point]:
    """One run, measured every ``EVERY`` updates, the first policy included."""
    print(f"{arm}, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        run_dir = Path(scratch, "run")
        overrides = (*SETTINGS, f"training.seed={seed}", f"training.train_iters={steps}")
        measure.run(ARMS[arm], *overrides, run_dir=run_dir)
        folders = [WORLD / "sft", *sorted((run_dir / "checkpoints").glob("hf_*"))]
        return [{"step": float(EVERY * number), **evaluate(folder, seed)} for number, folder in enumerate(folders)]


def evaluate(folder: Path, seed: int) -> Point:
    """Ground truth and KL of one completion for each held-out prompt; the same random numbers for every policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlxf.tools.tiny import models

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "sft")
    policy, first = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, WORLD / "sft"))
    prompts = [json.loads(line)["prompt"] for line in (WORLD / "eval_prompts.jsonl").read_text().splitlines()]
    torch.manual_seed(1000 + seed)
    samples = models.sample(policy, tokenizer, prompts, max_new_tokens=32)
    torch.manual_seed(2000 + seed)  # the opponent has random numbers of its own
    opponent = models.sample(first, tokenizer, prompts, max_new_tokens=32)
    texts, initial = ([tokenizer.decode(one.tokens) for one in side] for side in (samples, opponent))
    ratios = [log_prob(policy, tokenizer, one) - log_prob(first, tokenizer, one) for one in samples]
    return {
        **truth.evaluate(prompts, texts, initial),
        "kl": sum(ratios) / len(ratios),
        "eos_rate": sum(one.finished for one in samples) / len(samples),
    }


def log_prob(model: Any, tokenizer: Any, sample: Any) -> float:
    """Log-probability of a completion, its EOS included, summed; nats."""
    import torch

    from rlxf.tools.tiny.models import EOS

    prompt = tokenizer(sample.prompt)["input_ids"]
    completion = [*sample.tokens, EOS] if sample.finished else sample.tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


def by_updates(report: Mapping[str, Any]) -> Iterator[str]:
    """Mean over the seeds, and smallest to largest, at every second measurement."""
    yield "| updates | arm | " + " | ".join(SHOWN) + " |"
    yield "|---" * (2 + len(SHOWN)) + "|"
    for index in range(0, len(report["arms"]["online"][0]), 2):
        for arm, runs in report["arms"].items():
            points = [run[index] for run in runs]
            yield f"| {points[0]['step']:.0f} | {arm} | " + " | ".join(_spread(points, name) for name in SHOWN) + " |"


def by_kl(report: Mapping[str, Any]) -> Iterator[str]:
    """All measurements of an arm whose KL lies in a band, averaged."""
    yield "| KL, nats | arm | measurements | positive | win_truth | valid |"
    yield "|---|---|---|---|---|---|"
    for low, high in KL_BANDS:
        for arm, runs in report["arms"].items():
            points = [point for run in runs for point in run if low <= point["kl"] < high]
            cells = [f"{_mean(points, name):.2f}" if points else "" for name in ("positive", "win_truth", "valid")]
            yield f"| {low:g}-{high:g} | {arm} | {len(points)} | " + " | ".join(cells) + " |"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Share of positive and of valid texts, against updates and against KL."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "rlxf", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 5), sharey=True)
    colours = {"online": "#1b6ca8", "offline": "#c8553d"}
    for row, name in enumerate(("positive", "valid")):
        for column, axis in enumerate(("step", "kl")):
            ax = axes[row][column]
            for arm, runs in report["arms"].items():
                for number, run in enumerate(runs):
                    label = arm if number == 0 else None
                    xs, ys = [point[axis] for point in run], [point[name] for point in run]
                    ax.plot(xs, ys, color=colours[arm], alpha=0.75, marker=".", linewidth=1, label=label)
            ax.set_ylim(0, 1.02)
            ax.set_xlabel({"step": "updates", "kl": "KL to the first policy, nats"}[axis] if row else "")
            ax.set_ylabel(f"share of {name} texts" if not column else "")
            if axis == "kl":
                ax.set_xlim(0, 16)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _mean(points: Sequence[Point], name: str) -> float:
    return sum(point[name] for point in points) / len(points)


def _spread(points: Sequence[Point], name: str) -> str:
    values = [point[name] for point in points]
    return f"{_mean(points, name):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
