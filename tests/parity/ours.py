"""This project's side of a comparison: its own recipe, its own rooms, its own driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlxf.assembly.local import launch
from rlxf.config.load import load_config
from tests.parity.fixed_data import FixedPrompt, Settings, write_preferences, write_rollouts
from tests.parity.oracle import Metrics
from tests.parity.trl_stages import tokenizer_of_stages
from tests.tiny_models import config as model_config

ROOT = Path(__file__).resolve().parents[2]
MAX_PROMPT_LENGTH = 32


def recipe(policy: Path, reference: Path, settings: Settings) -> dict[str, Any]:
    """What online and offline recipes share: one process, fp32 on the CPU, one optimizer step per driver step."""
    shape = model_config()
    return {
        "runtime": "local",
        "training": {
            "stage": "ray_online_dpo",
            "device": "cpu",
            "seed": settings.seed,
            "global_batch_size": settings.pairs_per_step,
            "train_iters": settings.num_steps,
        },
        "model": {
            "parity": {
                "num_layers": shape.num_hidden_layers,
                "hidden_size": shape.hidden_size,
                "ffn_hidden_size": shape.intermediate_size,
                "num_attention_heads": shape.num_attention_heads,
                "num_query_groups": shape.num_key_value_heads,
                "vocab_size": shape.vocab_size,
                "max_position_embeddings": shape.max_position_embeddings,
                "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
            }
        },
        "actor_rollout": {
            "model": "parity",
            "load": str(policy),
            "max_prompt_length": MAX_PROMPT_LENGTH,
            "seq_length": MAX_PROMPT_LENGTH + settings.max_new_tokens,
            "missing_eos_penalty": settings.missing_eos_penalty,
            "ppo_mini_batch_size": settings.pairs_per_step,
            "micro_batch_size": settings.micro_batch_size,
            "dpo_loss_type": settings.loss_type,
            "dpo_loss_weights": settings.loss_weights,
            "dpo_label_smoothing": settings.label_smoothing,
            "f_divergence_type": settings.divergence,
            "f_alpha_divergence_coef": settings.alpha,
            "dpo_beta": settings.beta,
            "ld_alpha": settings.ld_alpha,
            "dpo_weighting": settings.weighting,
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "clip_grad": settings.clip_grad,
            "no_shuffle": True,
        },
        "ref": {"model": "parity", "load": str(reference), "seq_length": MAX_PROMPT_LENGTH + settings.max_new_tokens},
        "reward": {},
    }


def online_recipe(
    rows: Sequence[FixedPrompt], policy: Path, reference: Path, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Replay of the recorded completions and scores."""
    values = recipe(policy, reference, settings)
    path = write_rollouts(rows, folder / "rollouts.jsonl")
    return {**values, "rollout": {"engine": "replay", "replay_path": str(path)}}


def offline_recipe(
    rows: Sequence[FixedPrompt], policy: Path, reference: Path, settings: Settings, folder: Path
) -> dict[str, Any]:
    """The preference file, in its order."""
    values = recipe(policy, reference, settings)
    values["training"]["stage"] = "dpo"
    values["actor_rollout"]["data_path"] = str(write_preferences(rows, folder / "preferences.jsonl"))
    return values


def stage_recipe(
    stage: str, records: Sequence[dict[str, Any]], model: Path, settings: Settings, folder: Path, **keys: Any
) -> dict[str, Any]:
    """``stage`` on the records, in their order, with a tokenizer that has the chat template of trl_stages.

    ``keys`` are keys of actor_rollout.
    """
    values = recipe(model, model, settings)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer_of_stages().save_pretrained(folder / "tokenizer")
    values["training"] |= {"stage": stage, "tokenizer_name_or_path": str(folder / "tokenizer")}
    values["actor_rollout"] |= {"data_path": str(folder / "records.jsonl"), "seq_length": 128, **keys}
    del values["ref"]
    return values


def train(values: dict[str, Any], run_dir: Path) -> list[Metrics]:
    """Run the recipe in this process, through the driver; what its ``metrics.jsonl`` says of each step."""
    run_dir.mkdir(parents=True)
    launch(load_config(values), run_dir)
    return read_metrics(run_dir)


def run_entry_point(values: dict[str, Any], run_dir: Path, *, timeout_s: int = 600) -> list[Metrics]:
    """The same as a user does it: a recipe file, a command line, a process of its own."""
    recipes = run_dir.parent / "recipes"
    recipes.mkdir()
    section = values.get("rollout", {})
    listed = {**values, "rollout": {k: v for k, v in section.items() if k != "engine"}}
    del listed["runtime"]
    text = yaml.safe_dump({"defaults": ["rlxf_schema", "_self_"], **listed}, sort_keys=False)
    (recipes / "parity.yaml").write_text(text)
    command = [sys.executable, "ray_gpt.py", "--config-dir", str(recipes), "--config-name", "parity", "runtime=local"]
    command += [f"rollout.engine={section['engine']}"] if section else []
    command += [f"hydra.run.dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=timeout_s, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return read_metrics(run_dir)


def read_metrics(run_dir: Path) -> list[Metrics]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
