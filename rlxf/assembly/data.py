"""The data of a recipe, opened and checked: tokenizer, prompts or pairs, and what is evaluated on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlxf.assembly.roles import policy_folder, policy_tokenizer
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.core.types import Examples, Pairs, PromptBatch
from rlxf.data.examples import ExampleFile
from rlxf.data.preferences import PreferenceFile
from rlxf.data.prompts import PromptFile
from rlxf.data.readers import Part
from rlxf.data.table import DataSettings
from rlxf.data.templates import chat_template
from rlxf.models.endings import Endings
from rlxf.models.tokenizer import eos_token_ids
from rlxf.rollout.replay import ReplayEngine, ReplaySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def needs_scorer(config: RunConfig) -> bool:
    """Whether a reward model or function has to score: not offline, not when the replayed file holds scores, and not
    when a judge alone compares."""
    return not config.offline and not config.replays_scores and not config.judges_alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads, opened and checked; needs no model."""

    tokenizer: PreTrainedTokenizerBase
    training: PromptFile | ReplayEngine | PreferenceFile | ExampleFile
    evaluation: PromptBatch | Sequence[Pairs | Examples] | None  # prompts of an online run, held-out data of others

    def say_dropped(self) -> None:
        """Tell which rows were left out, at the end of a run."""
        if not isinstance(self.training, ReplayEngine):
            self.training.log_dropped()


def load_data(config: RunConfig) -> Data:
    """Tokenizer, prompts or pairs, and evaluation prompts if this run evaluates.

    Raises:
        DataError: a file is missing or wrong.
    """
    tokenizer = policy_tokenizer(config)
    if config.actor_rollout.eos_tokens:  # one that the tokenizer lacks is told now, not by the first save
        eos_token_ids(policy_folder(config), tokenizer, config.actor_rollout.eos_tokens)
    if config.offline:
        open_file = open_examples if config.rows == "examples" else open_preferences
        training = open_file(config, tokenizer)
        held_out = open_file(config, tokenizer, "valid") if config.evaluates else None
        batches = held_out.eval_batches(config.eval.num_prompts) if held_out is not None else None
        return Data(tokenizer=tokenizer, training=training, evaluation=batches)
    if config.engine == "replay":
        return Data(tokenizer=tokenizer, training=open_replay(config, tokenizer), evaluation=None)
    evaluation = eval_prompts(config, tokenizer) if config.evaluates else None
    return Data(tokenizer=tokenizer, training=open_prompts(config, tokenizer), evaluation=evaluation)


def open_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, part: Part = "train") -> PromptFile:
    """A part of the prompts of an online run."""
    return PromptFile(_settings(config), tokenizer, part)


def eval_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """The first ``eval.num_prompts`` prompts that fit, in file order, as one batch (fewer where there are fewer)."""
    return open_prompts(config, tokenizer, "valid").first(config.eval.num_prompts)


def open_preferences(config: RunConfig, tokenizer: PreTrainedTokenizerBase, part: Part = "train") -> PreferenceFile:
    """A part of the pairs that a run of stage dpo or rm reads."""
    actor, endings = config.actor_rollout, None
    if config.objective == "reward":
        endings = Endings.of(tokenizer, actor.load, tokens=actor.eos_tokens)
    return PreferenceFile(_settings(config), tokenizer, part, endings=endings)


def open_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase, part: Part = "train") -> ExampleFile:
    """A part of the examples that a run of stage sft reads."""
    return ExampleFile(_settings(config), tokenizer, part)


def open_replay(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ReplayEngine:
    """The recording that a run with ``rollout.engine=replay`` trains on.

    Raises:
        ConfigError: none is named, or it holds fewer steps than the run has.
    """
    path, actor, training = config.rollout.replay_path, config.actor_rollout, config.training
    if path is None:
        raise ConfigError("rollout.replay_path is not set; rollout.engine=replay trains on a rollouts.jsonl")
    settings = ReplaySettings(
        path=Path(path),
        batch_size=training.global_batch_size,
        num_steps=training.train_iters,
        seq_length=actor.seq_length,
        vocab_size=config.model[actor.model].vocab_size if actor.model in config.model else None,
    )
    return ReplayEngine(settings, tokenizer)


def _settings(config: RunConfig) -> DataSettings:
    training = config.training
    return DataSettings(
        config=config.actor_rollout,
        eval_path=config.eval.data_path,
        batch_size=training.global_batch_size,
        seed=training.seed,
    )


def with_epochs(config: RunConfig) -> tuple[RunConfig, Data | None]:
    """The recipe with its number of steps: ``training.epochs`` passes over the rows that are kept, rounded up.

    And with the tokens that end a turn of its chat template (``actor_rollout.prompt_type``).

    Returns:
        The data, too, where they had to be read for that.
    """
    config = _with_eos_tokens(config)
    epochs = config.training.epochs
    if epochs is None:
        return config, None
    data = load_data(config)
    assert not isinstance(data.training, ReplayEngine)  # checked with the recipe
    steps = math.ceil(epochs * data.training.num_kept() / config.training.global_batch_size)
    training = config.training.model_copy(update={"train_iters": max(1, steps)})
    log.info("training.epochs = %g makes %d steps", epochs, training.train_iters)
    return config.model_copy(update={"training": training}), data


def _with_eos_tokens(config: RunConfig) -> RunConfig:
    actor = config.actor_rollout
    if actor.prompt_type is None or actor.eos_tokens is not None:
        return config
    tokens = chat_template(actor.prompt_type).eos_tokens
    return config.model_copy(update={"actor_rollout": actor.model_copy(update={"eos_tokens": tokens})})
