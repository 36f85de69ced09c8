"""Recipes for tests: the repository's, composed as the command does it, and a small one as plain data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from workers import cli

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(file.stem for file in cli.RECIPES.glob("*.yaml"))


def compose(name: str, *arguments: str, folder: Path = cli.RECIPES) -> dict[str, Any]:
    """What ``ray_gpt.py --config-name NAME ARGUMENTS`` hands to ``load_config``."""
    command = cli.read_command(arguments)
    assert not command.problems
    return cli.plain(composed(name, command.arguments, folder), [])


def composed(name: str, overrides: list[str], folder: Path = cli.RECIPES) -> DictConfig:
    cli.register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return hydra.compose(config_name=name, overrides=overrides)


# The shape of tests/tiny_models.py, on CPU, with every file missing: only a dry run accepts it.
_PLAIN: dict[str, Any] = {
    "dry_run": True,
    "training": {"stage": "ray_online_dpo", "device": "cpu", "seq_length": 64},
    "model": {
        "tiny": {
            "num_layers": 2,
            "hidden_size": 128,
            "ffn_hidden_size": 192,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 260,
            "max_position_embeddings": 512,
        }
    },
    "actor_rollout": {"model": "tiny", "load": "sft", "data_path": "prompts.jsonl", "max_prompt_length": 32},
    "ref": {"model": "tiny"},
    "reward": {"model": "tiny", "load": "rm"},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """The small recipe with changes: ``recipe(actor_rollout={"lr": 1e-3})`` adds to a section, None removes a key."""
    raw = copy.deepcopy(_PLAIN)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(raw.get(name), dict):
            _change(raw[name], value)
        else:
            raw[name] = value
    return raw


def _change(section: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(section.get(key), dict):
            _change(section[key], value)
        elif value is None:
            section.pop(key, None)
        else:
            section[key] = value


# The shape of the small recipe as a config.json has it.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def model_folder(folder: Path, **changes: Any) -> Path:
    """The small files of a model folder, which the checks look at. ``changes`` of config.json; None removes a key."""
    settings = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def reward_folder(folder: Path, **changes: Any) -> Path:
    """The same of a reward model."""
    return model_folder(
        folder,
        **{
            "architectures": ["LlamaForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "rlxf_read_at": "last_token",
        }
        | changes,
    )
