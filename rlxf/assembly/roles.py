"""Building each role's room from a recipe, for the process that holds it.

A room's imports are inside its function, so that a process imports only what it holds.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.platform.base import Platform, Process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlxf.reference.frozen import FrozenReference
    from rlxf.rollout.engine import RolloutEngine
    from rlxf.score.scorer import Scorer
    from rlxf.update.actor import Actor


def build_actor(config: RunConfig, platform: Platform, process: Process) -> Actor:
    """One rank of the actor."""
    from rlxf.update.actor import Actor

    actor = config.actor_rollout
    own = actor.tokenizer_name_or_path or actor.prompt_type or actor.eos_tokens
    return Actor(config, platform, process, save_tokenizer=partial(save_policy_tokenizer, config) if own else None)


def build_reference(config: RunConfig, platform: Platform, process: Process) -> FrozenReference:
    """One rank of the reference."""
    from rlxf.reference.frozen import FrozenReference

    return FrozenReference(config, platform, process)


def build_scorer(config: RunConfig, platform: Platform, process: Process) -> Scorer:
    """One rank of the reward model, the reward function, or the scores of a replay."""
    from rlxf.score import SCORERS, ScorerParts, scorer_of

    tokenizer = partial(policy_tokenizer, config)
    parts = ScorerParts(config=config, platform=platform, process=process, tokenizer=tokenizer)
    return SCORERS[scorer_of(config)](parts)


def build_engine(config: RunConfig, platform: Platform) -> RolloutEngine:
    """One rollout engine."""
    from rlxf.rollout import ENGINES

    return ENGINES[config.engine](config, platform)


def policy_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: prompts, completions and decoded texts are in its tokens.

    Raises:
        ConfigError: ``actor_rollout.prompt_type`` names no chat template.
    """
    from rlxf.data.templates import chat_template
    from rlxf.models.tokenizer import load_tokenizer

    actor = config.actor_rollout
    template = chat_template(actor.prompt_type).jinja if actor.prompt_type else None
    folder = actor.tokenizer_name_or_path or policy_folder(config)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.training.trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def save_policy_tokenizer(config: RunConfig, folder: Path) -> None:
    """Write the tokenizer that the policy was trained with, its chat template and its EOS into a model folder.

    It takes the place of the one that is there. ``generate`` then stops where a turn of that template ends, and a
    reward model's score is read before that tokenizer's padding.
    """
    from rlxf.models.hf_folder import remove_tokenizer
    from rlxf.models.tokenizer import eos_token_ids, padding_id

    actor = config.actor_rollout
    tokenizer = policy_tokenizer(config)
    remove_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    eos_ids = eos_token_ids(policy_folder(config), tokenizer, actor.eos_tokens)
    _change(folder / "generation_config.json", {"eos_token_id": list(eos_ids)})
    padding = padding_id(folder) if actor.tokenizer_name_or_path and config.objective == "reward" else None
    if padding is not None:
        _change(folder / "config.json", {"pad_token_id": padding})


def _change(file: Path, changes: dict[str, Any]) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(settings | changes, indent=2) + "\n", encoding="utf-8")


def policy_folder(config: RunConfig) -> str:
    """The model folder that the policy starts from."""
    if config.actor_rollout.load is None:
        raise ConfigError("actor_rollout.load is not set; expected a Hugging Face folder with the policy")
    return config.actor_rollout.load
