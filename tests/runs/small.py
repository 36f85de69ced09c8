"""Whole runs on small random models: a recipe as plain data, run in this process or by the command, and its results."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from rlxf.assembly.local import launch
from rlxf.config.load import load_config
from rlxf.observe.formulas import read_jsonl
from tests.data_world import chat_tokenizer, write_rows
from tests.settings import MODEL
from tests.tiny_models import EOS, VOCAB, save_causal_lm, save_reward_model

ROOT = Path(__file__).resolve().parents[2]
Recipe = dict[str, dict[str, Any]]

NUM_PROMPTS = 12
# Besides </s>, so that a random model ends about a quarter of its completions before they are cut off.
MORE_EOS = tuple(range(60, 70))
# What depends on a clock, or on the machine; everything else of a run must repeat.
CLOCKED = (
    *("timing/", "memory/", "pipeline/", "speed/", "plan/", "rollout/tokens_per_s", "rollout/tail_s"),
    *("sync/seconds", "sync/gb_per_s", "sync/transport", "sync/copy_s"),
)

# Few different scores, so that prompts tie.
COARSE_REWARD = """
def reward(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 3) for ids in completion_ids]
"""


@dataclass(frozen=True)
class World:
    """Models and prompts of a small run."""

    folder: Path

    def recipe(self, **changes: dict[str, Any]) -> Recipe:
        """Online DPO in one process; ``changes`` add to a section."""
        base: Recipe = {
            "training": {
                "stage": "ray_online_dpo", "device": "cpu", "seed": 5, "global_batch_size": 4, "train_iters": 3,
                "seq_length": 48,
            },
            "model": {"small": MODEL.model_dump()},
            "actor_rollout": {
                "model": "small", "load": str(self.folder / "policy"), "data_path": str(self.folder / "prompts.jsonl"),
                "max_prompt_length": 24, "max_new_tokens": 12, "n_samples_per_prompt": 3, "ppo_mini_batch_size": 4,
                "micro_batch_size": 2, "lr": 1e-3,
            },
            "ref": {"model": "small", "load": str(self.folder / "policy")},
            "reward": {"model": "small", "load": str(self.folder / "reward")},
            "rollout": {},
            "log": {"tensorboard": False, "samples_interval": 0, "report": False},
        }  # fmt: skip
        for section, values in changes.items():
            base.setdefault(section, {}).update(values)
        return base

    def reward_function(self, folder: Path, code: str) -> dict[str, Any]:
        """The ``reward`` section that scores with ``code`` instead of the reward model."""
        path = folder / "reward.py"
        path.write_text(code)
        return {"model": None, "load": None, "function": str(path)}


def make_world(folder: Path) -> World:
    policy = save_causal_lm(folder / "policy", seed=3)
    chat_tokenizer().save_pretrained(policy)
    generation = {"eos_token_id": [EOS, *MORE_EOS], "bos_token_id": 1, "pad_token_id": 0}
    (policy / "generation_config.json").write_text(json.dumps(generation))
    save_reward_model(folder / "reward", seed=4)
    words = ("one", "two", "three", "four")
    rows = [{"prompt": f"say {words[i % 4]} {i}", "number": i, "topic": words[i % 4]} for i in range(NUM_PROMPTS)]
    write_rows(folder / "prompts.jsonl", rows)
    assert max(MORE_EOS) < VOCAB
    return World(folder)


@dataclass(frozen=True)
class Finished:
    """What a run has left behind."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """Every metric of every step but those of clock and machine."""
        return [{name: v for name, v in row.items() if not name.startswith(CLOCKED)} for row in self.rows]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "rollouts.jsonl")

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """``rollouts`` without the KL of completions, which needs an engine's log-probs: a replay has none."""
        rows = self.rollouts
        for completion in (completion for row in rows for completion in row["completions"]):
            completion.pop("kl", None)
        return rows

    @property
    def weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(self.folder / "policy" / "model.safetensors")
        return weights


def run(recipe: Recipe, run_dir: Path) -> Finished:
    """Run the recipe in this process, as ``runtime=local`` does."""
    run_dir.mkdir(parents=True)
    launch(load_config({"runtime": "local", **recipe}), run_dir)
    return Finished(run_dir)


def replay_of(recipe: Recipe, recording: Path) -> Recipe:
    """The same recipe on recorded rollouts, without an engine."""
    other = copy.deepcopy(recipe)
    other["rollout"] |= {"engine": "replay", "replay_path": str(recording)}
    return other


def command(recipe: Recipe, run_dir: Path, *overrides: str) -> list[str]:
    """The command that runs the recipe, written to a file; ``run_dir`` is made by the run."""
    folder = run_dir.with_name(f"{run_dir.name}_recipe")
    folder.mkdir(parents=True)
    text = yaml.safe_dump({"defaults": ["rlxf_schema", "_self_"], **recipe}, sort_keys=False)
    (folder / "small.yaml").write_text(text)
    options = ["--config-dir", str(folder), "--config-name", "small", f"hydra.run.dir={run_dir}"]
    return [sys.executable, str(ROOT / "ray_gpt.py"), *options, *overrides]


def environment() -> dict[str, str]:
    """Of a run that finds no cluster by itself, and whose threads do not spin."""
    return {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def ray_gpt(
    *arguments: str, timeout_s: int = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command as it is typed in the repository's folder."""
    return subprocess.run(
        [sys.executable, "ray_gpt.py", *arguments],
        cwd=ROOT, env=env or environment(), capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
