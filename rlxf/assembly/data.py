"""The data of a recipe, opened and checked: tokenizer, prompts or pairs, and what is evaluated on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlxf.assembly.roles import policy_folder, policy_tokenizer
from rlxf.config.schema import RunConfig
from rlxf.core.types import Examples, Pairs, PromptBatch
from rlxf.data.examples import ExampleFile
from rlxf.data.preferences import PreferenceFile
from rlxf.data.prompts import PromptSource, eval_prompts
from rlxf.data.templates import chat_template
from rlxf.models.tokenizer import eos_token_ids
from rlxf.rollout.replay import ReplayEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def needs_scorer(config: RunConfig) -> bool:
    """Whether a reward model or function has to score: not offline, and not when the replayed file holds scores."""
    return not config.offline and not config.replays_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads, opened and checked; needs no model."""

    tokenizer: PreTrainedTokenizerBase
    training: PromptSource | ReplayEngine | PreferenceFile | ExampleFile
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
        kind = ExampleFile if config.rows == "examples" else PreferenceFile
        training = kind(config, tokenizer)
        held_out = kind(config, tokenizer, part="valid") if config.evaluates else None
        batches = held_out.eval_batches(config.eval.num_prompts) if held_out is not None else None
        return Data(tokenizer=tokenizer, training=training, evaluation=batches)
    if config.engine == "replay":
        return Data(tokenizer=tokenizer, training=ReplayEngine(config), evaluation=None)
    evaluation = eval_prompts(config, tokenizer) if config.evaluates else None
    return Data(tokenizer=tokenizer, training=PromptSource(config, tokenizer), evaluation=evaluation)


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
