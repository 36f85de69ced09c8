"""Preference pairs from a file, tokenized as TRL's `DPOTrainer` does, so that the two train on the same tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rlxf.config.schema import ActorConfig, RunConfig
from rlxf.data.batches import Batches, Drop, RowOrder
from rlxf.data.readers import RowFile, open_rows
from rlxf.data.text import (
    encode_chat,
    encode_string,
    field_problem,
    is_chat,
    prompt_problem,
    require_chat_template,
    shorten_left,
)
from rlxf.errors import ConfigError, DataError, ModelError
from rlxf.jsonl import Row
from rlxf.types import Messages, Pairs, Sequences, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
PairIds = tuple[list[int], list[int], list[int]]  # prompt, chosen completion, rejected completion


class PreferenceFile:
    """``global_batch_size`` pairs per step from a file of prompt, chosen and rejected: strings or chat messages.

    Chats may leave the prompt out: then it is what the chosen and the rejected conversation have in common.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        actor, training = config.actor_rollout, config.training
        if actor.data_path is None:
            raise ConfigError(
                "actor_rollout.data_path is not set; expected a .jsonl or .parquet file of preference pairs"
            )
        self._config = actor
        self._tokenizer = tokenizer
        self._has_chat = self._has_strings = self._warned = False
        self._rows: RowFile = open_rows(actor.data_path, self._check)
        if self._has_chat:
            require_chat_template(tokenizer, self._rows.path)
        if self._has_strings and tokenizer.eos_token is None:
            raise ModelError(
                f"{self._rows.path}: holds strings, whose completions end with EOS, but the tokenizer "
                f"{tokenizer.name_or_path!r} has no eos_token; set it in tokenizer_config.json"
            )
        self._make(0, self._rows[0])  # a template or tokenizer that cannot work fails here, not in a later step
        self._batches: Batches[PairIds] = Batches(
            self._rows,
            RowOrder(len(self._rows), seed=training.seed, shuffle=not actor.no_shuffle),
            training.global_batch_size,
            self._make,
            strict=actor.prompt_overflow == "error",
        )

    def __len__(self) -> int:
        """Rows of the file."""
        return len(self._rows)

    def next_batch(self, step: int) -> Pairs:
        """The pairs of a step; the same for the same step, whatever was asked for before."""
        items = self._batches.batch(step)
        prompts = [prompt for prompt, _, _ in items]
        return Pairs(
            chosen=Sequences.from_rows(prompts, [chosen for _, chosen, _ in items]),
            rejected=Sequences.from_rows(prompts, [rejected for _, _, rejected in items]),
        )

    def prompt_ids(self, step: int) -> list[int]:
        """The rows of the file that a step is made of."""
        return self._batches.rows(step)

    def epoch(self, step: int) -> float:
        """Passes over the file at the end of a step; dropped rows are part of a pass."""
        return self._batches.epoch(step)

    @property
    def num_dropped(self) -> int:
        """Rows passed over so far because they were too long or chose nothing, each counted once."""
        return self._batches.dropped.total()

    def _check(self, row: Row) -> str | None:
        config = self._config
        problem = field_problem(row, config.chosen_key) or field_problem(row, config.rejected_key)
        if problem:
            return problem
        chosen, rejected = row[config.chosen_key], row[config.rejected_key]
        implicit = config.prompt_key not in row and is_chat(chosen) and is_chat(rejected)
        if not implicit and (problem := prompt_problem(row, config.prompt_key)):
            return problem
        prompt, chosen, rejected = self._split(row)
        if len({is_chat(prompt), is_chat(chosen), is_chat(rejected)}) > 1:
            kinds = ", ".join(
                f"{name} is {'chat messages' if is_chat(text) else 'a string'}"
                for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
            )
            return f"the three texts of a row must be of one kind, but {kinds}"
        self._has_chat |= is_chat(prompt)
        self._has_strings |= not is_chat(prompt)
        if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
            return None
        return _conversation_problem(prompt, chosen, rejected)

    def _split(self, row: Row) -> tuple[Text, Text, Text]:
        """Prompt, chosen and rejected; an implicit prompt is the common start of the two conversations."""
        config = self._config
        chosen, rejected = row[config.chosen_key], row[config.rejected_key]
        if config.prompt_key in row:
            return row[config.prompt_key], chosen, rejected
        shared = _common_prefix(chosen, rejected)
        return chosen[:shared], chosen[shared:], rejected[shared:]

    def _make(self, row_number: int, row: Row) -> PairIds | Drop:
        """The token ids of one row, or why there are none."""
        config = self._config
        try:
            prompt, chosen, rejected = self._encode(*self._split(row))
        except DataError as error:
            raise DataError(f"{self._rows.where(row_number)}: {error}") from error
        if chosen == rejected:
            return Drop("chosen and rejected are the same tokens")
        if not prompt:
            return Drop("no token of the prompt is left once it is tokenized together with its completions")
        room = min(config.max_prompt_length, config.seq_length - max(len(chosen), len(rejected)))
        if len(prompt) > room:
            if config.prompt_overflow == "error":
                return Drop(f"the prompt has {len(prompt)} tokens, more than {_limit(room, config)}", is_error=True)
            if config.prompt_overflow == "drop" or room < 1:
                return Drop(f"the prompt is longer than {_limit(room, config)}")
            prompt = shorten_left(prompt, room, self._tokenizer.bos_token_id)
        return prompt, chosen, rejected

    def _encode(self, prompt: Text, chosen: Text, rejected: Text) -> PairIds:
        """Token ids, split where the prompt alone and the prompt with its completions stop being equal.

        That is the end of the prompt, except when the tokenizer or the template writes the prompt differently once
        something follows it; then the end of the prompt that differs is left out.
        """
        if isinstance(prompt, str):
            texts = [prompt, *(_with_eos(f"{prompt}{side}", self._tokenizer.eos_token) for side in (chosen, rejected))]
            alone, with_chosen, with_rejected = (encode_string(self._tokenizer, text) for text in texts)
        else:
            assert isinstance(chosen, list)  # a row's three texts are of one kind: checked when the file was opened
            assert isinstance(rejected, list)
            alone = encode_chat(self._tokenizer, prompt, add_generation_prompt=True)
            with_chosen = encode_chat(self._tokenizer, prompt + chosen)
            with_rejected = encode_chat(self._tokenizer, prompt + rejected)
        shared = min(_common_prefix(alone, with_chosen), _common_prefix(alone, with_rejected))
        if shared < len(alone) and not self._warned:
            self._warned = True
            log.warning(
                "%s: prompts are tokenized differently with a completion behind them; the end of the prompt that "
                "differs is left out of the training sequences (first seen: %r)",
                self._rows.path,
                self._tokenizer.decode(alone[shared:]),
            )
        return alone[:shared], with_chosen[shared:], with_rejected[shared:]


def _conversation_problem(prompt: Messages, chosen: Messages, rejected: Messages) -> str | None:
    if not prompt:
        return "there is no prompt field, and the chosen and rejected conversations start differently: no common prompt"
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            return f"the {name} conversation holds nothing beyond the prompt"
        if side[: len(prompt)] == prompt:
            return f"the {name} messages repeat the prompt; leave the prompt out of them, or leave out the prompt field"
    return None


def _limit(room: int, config: ActorConfig) -> str:
    if room == config.max_prompt_length:
        return f"actor_rollout.max_prompt_length={config.max_prompt_length}"
    return f"what its completions leave of actor_rollout.seq_length={config.seq_length}"


def _with_eos(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos


def _common_prefix(left: list[int] | Messages, right: list[int] | Messages) -> int:
    """How many leading items two lists share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
