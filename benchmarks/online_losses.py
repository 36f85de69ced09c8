"""Which losses learn online? The tiny recipe with each loss of the DPO family, everything else equal.

    python benchmarks/online_losses.py               # results/online_losses.json
    python benchmarks/online_losses.py simpo orpo    # some of them

A loss has *learnt* if the share of positive texts (ground truth) has risen by .3 and that of valid texts is still .6: a
policy that pleases the reward model with text that is no longer in the grammar has failed. If a loss has a natural
scale of its own, its beta or learning rate is set to that scale. The result lists all settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.tiny_learning import RECIPE, evaluations  # noqa: E402
from rlxf.config.kinds import LossType  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "online_losses.json"
SHOWN = ("positive", "win_truth", "valid", "kl", "eos_rate", "length")
RISE, VALID = 0.3, 0.6
# Settings of every run. The learning rate is that of the first comparison of the losses.
COMMON = (
    "training.train_iters=80",
    "training.eval_interval=80",
    "actor_rollout.dpo_beta=0.1",
    "actor_rollout.lr=8e-4",
    "actor_rollout.min_lr=5e-5",
)
# Settings that a loss needs in addition to COMMON.
_SLOWER = ("actor_rollout.lr=4e-4",)  # with 8e-4 the text leaves the grammar, at a KL of 25 and more
SETTINGS: dict[str, tuple[str, ...]] = {
    "robust": ("actor_rollout.dpo_label_smoothing=0.1", *_SLOWER),
    "exo_pair": ("actor_rollout.dpo_label_smoothing=0.001", *_SLOWER),
    "orpo": ("actor_rollout.lr=3e-4",),  # no reference: only the learning rate limits the drift
    **dict.fromkeys(("sigmoid_norm", "aot_unpaired"), ("actor_rollout.lr=3e-4",)),
    "simpo": ("actor_rollout.dpo_beta=2.0", "actor_rollout.simpo_gamma=0.5", "actor_rollout.lr=3e-4"),
    **dict.fromkeys(("kto_pair", "aot", "apo_zero", "apo_down", "sft"), _SLOWER),
}


def main() -> None:
    arguments = parse()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() and arguments.losses else {}
    for loss in arguments.losses or get_args(LossType):
        found[loss] = run_loss(loss, arguments.seed)
        print(next(rows({loss: found[loss]})), flush=True)
        ordered = {name: found[name] for name in get_args(LossType) if name in found}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    print("\n".join(("", *table(found))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", help=f"default: all of {', '.join(get_args(LossType))}")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def run_loss(loss: str, seed: int) -> dict[str, Any]:
    """The first and the last evaluation of one run."""
    settings = SETTINGS.get(loss, ())
    overrides = (*COMMON, f"actor_rollout.dpo_loss_type={loss}", *settings, f"training.seed={seed}", "runtime=local")
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        quiet = ("eval.greedy=false", "log.tensorboard=false")
        measure.run(RECIPE, *overrides, *quiet, run_dir=Path(scratch, "run"))
        first, *_, last = evaluations(Path(scratch, "run"))
    learnt = last["positive"] - first["positive"] >= RISE and last["valid"] >= VALID
    return {"settings": settings, "first": first, "last": last, "learnt": learnt}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| loss | settings | " + " | ".join(SHOWN) + " | learnt |"
    yield "|---" * (3 + len(SHOWN)) + "|"
    yield from rows(found)


def rows(found: Mapping[str, Any]) -> Iterator[str]:
    for loss, run in found.items():
        settings = ", ".join(setting.removeprefix("actor_rollout.") for setting in run["settings"])
        cells = " | ".join(f"{run['last'][name]:.2f}" for name in SHOWN)
        yield f"| {loss} | {settings} | {cells} | {'yes' if run['learnt'] else 'no'} |"


if __name__ == "__main__":
    main()
