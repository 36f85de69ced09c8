"""``python ray_gpt.py --help`` and ``rlxf train --help``: the recipes, the keys used most, and where the rest is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlxf.config.keys import SECTIONS

# In the order in which somebody with a model and a file of prompts meets them; the schema says what the others mean.
_KEYS = {
    "actor_rollout.load": "the policy: a Hugging Face folder, or a checkpoint",
    "ref.load": "the reference: usually the same folder; sft and rm need none",
    "reward.load": "the reward model: a *ForSequenceClassification of one label",
    "reward.function": "or a Python file that scores: `reward(prompts, completions, completion_ids, **columns)`",
    "actor_rollout.data_path": "prompts (dpo, rm: pairs; sft: examples): files, folders, data sets on disk",
    "runtime": "local: one process without Ray",
    "dry_run": "check the recipe, print the placement plan and end",
    "training.device": None,
    "training.train_iters": None,
    "training.global_batch_size": None,
    "training.seq_length": "longest prompt + completion, tokens",
    "training.bf16": "true: compute in bfloat16; false: in fp32",
    "actor_rollout.ppo_mini_batch_size": None,
    "actor_rollout.micro_batch_size": None,
    "actor_rollout.lr": None,
    "actor_rollout.dpo_beta": None,
    "actor_rollout.dpo_loss_type": None,
    "actor_rollout.lora_r": None,
    "actor_rollout.num_gpus_for_train": None,
    "actor_rollout.tensor_model_parallel_size": None,
    "resource_pool.actor_rollout": None,
    "training.eval_interval": None,
    "training.save_interval": None,
    "training.resume": None,
    "actor_rollout.save": None,
}

_BEGIN = """\
Train from a recipe:

  {program} --config-name RECIPE [key=value ...]

Your own model: any Llama-, Qwen2- or Qwen3-shaped folder trains on top of any recipe. Its config.json gives the shape.

  {program} --config-name online_dpo_trainer_llama32_1b actor_rollout.load=./mine ref.load=./mine \\
      reward.load=./my_reward_model actor_rollout.data_path=./prompts.jsonl
"""
_END = """\
The rest:
  dry_run=true        checks the recipe, prints which role gets which device, and what is missing here
  --cfg job           prints the composed recipe with every key
  --multirun          runs a recipe for each of several values: training.seed=1,2
  --config-dir DIR    adds a folder of your own recipes
  --hydra-help        other options
  docs/config.md      every key with its type, default and meaning
  docs/tutorial.md    the whole way, from text to an aligned model
  docs/data.md        kinds and formats of data files
"""


def help_text(program: Sequence[str], folders: Sequence[Path]) -> str:
    """The page of ``--help``. ``program``: the command as it was typed; ``folders``: where recipes are looked for."""
    recipes = {file.stem: first_comment(file) for folder in folders for file in sorted(folder.glob("*.yaml"))}
    parts = [_BEGIN.format(program=shlex.join(program)), "Recipes:", *_table(recipes), "", "Keys used most:"]
    parts += [*_table({key: text or _meaning(key) for key, text in _KEYS.items()}), "", _END]
    return "\n".join(parts)


def first_comment(recipe: Path) -> str:
    """The text of a recipe's first comment line; empty where it begins otherwise."""
    with recipe.open(encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _table(rows: dict[str, str]) -> Iterator[str]:
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        yield f"  {name.ljust(width)}  {text}".rstrip()


def _meaning(key: str) -> str:
    """What the schema says about a key."""
    section, _, name = key.partition(".")
    return " ".join((SECTIONS[section].model_fields[name].description or "").split())
