"""Prompts of a run and of its evaluations, tokenized once, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlxf.config.schema import ActorConfig, RunConfig
from rlxf.data.batches import Batches, Drop, RowOrder
from rlxf.data.readers import RowFile, open_rows
from rlxf.data.text import encode_prompt, is_chat, prompt_problem, require_chat_template, shorten_left
from rlxf.errors import ConfigError, DataError
from rlxf.jsonl import Row
from rlxf.types import PromptBatch, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = tuple[int, Row, list[int]]  # row number, row, token ids


class PromptFile:
    """A file of prompts: each row checked when it is opened, tokenized when it is asked for."""

    def __init__(self, path: str | Path, config: ActorConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._has_chat = False
        self.rows: RowFile = open_rows(path, self._check)
        if self._has_chat:
            require_chat_template(tokenizer, self.rows.path)
        self.make(0, self.rows[0])  # a template or tokenizer that cannot work fails here, not in a later step

    def make(self, row_number: int, row: Row) -> Prompt | Drop:
        """The prompt of one row, or why there is none."""
        config = self._config
        try:
            ids = encode_prompt(self._tokenizer, row[config.prompt_key])
        except DataError as error:
            raise DataError(f"{self.rows.where(row_number)}: {error}") from error
        if not ids:
            return Drop(f"field {config.prompt_key!r} gives no tokens")
        if len(ids) > config.max_prompt_length:
            if config.prompt_overflow == "error":
                return Drop(f"the prompt has {len(ids)} tokens, more than {_limit(config)}", is_error=True)
            if config.prompt_overflow == "drop":
                return Drop(f"the prompt is longer than {_limit(config)}")
            ids = shorten_left(ids, config.max_prompt_length, self._tokenizer.bos_token_id)
        return row_number, row, ids

    def batch(self, items: Sequence[Prompt]) -> PromptBatch:
        """Prompts as the other rooms take them; a column that a row lacks is None there."""
        key = self._config.prompt_key
        columns: dict[str, list[Any]] = {
            name: [row.get(name) for _, row, _ in items] for name in self.rows.columns if name != key
        }
        return PromptBatch(
            prompts=Tokens.from_rows([ids for _, _, ids in items]),
            prompt_ids=torch.tensor([number for number, _, _ in items], dtype=torch.int64),
            texts=tuple(row[key] for _, row, _ in items),
            columns=columns,
        )

    def _check(self, row: Row) -> str | None:
        key = self._config.prompt_key
        self._has_chat |= is_chat(row.get(key))
        return prompt_problem(row, key)


class PromptSource:
    """Training prompts: ``global_batch_size`` per step, epoch after epoch, each epoch in an order of its own."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        actor, training = config.actor_rollout, config.training
        if actor.data_path is None:
            raise ConfigError("actor_rollout.data_path is not set; expected a .jsonl or .parquet file of prompts")
        self._file = PromptFile(actor.data_path, actor, tokenizer)
        self._batches: Batches[Prompt] = Batches(
            self._file.rows,
            RowOrder(len(self._file.rows), seed=training.seed, shuffle=not actor.no_shuffle),
            training.global_batch_size,
            self._file.make,
            strict=actor.prompt_overflow == "error",
        )

    def __len__(self) -> int:
        """Rows of the file."""
        return len(self._file.rows)

    def next_batch(self, step: int) -> PromptBatch:
        """The prompts of a step; the same for the same step, whatever was asked for before."""
        return self._file.batch(self._batches.batch(step))

    def prompt_ids(self, step: int) -> list[int]:
        """The rows of the file that a step is made of."""
        return self._batches.rows(step)

    def epoch(self, step: int) -> float:
        """Passes over the file at the end of a step; dropped rows are part of a pass."""
        return self._batches.epoch(step)

    @property
    def num_dropped(self) -> int:
        """Rows passed over so far because they were too long or empty, each counted once."""
        return self._batches.dropped.total()


def eval_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """The first ``eval.num_prompts`` prompts that fit, in file order (all of them when the file holds fewer)."""
    path = config.eval.data_path or config.actor_rollout.data_path
    if path is None:
        raise ConfigError("neither eval.data_path nor actor_rollout.data_path is set; an evaluation needs prompts")
    file = PromptFile(path, config.actor_rollout, tokenizer)
    kept: list[Prompt] = []
    reason = ""
    for number in range(len(file.rows)):
        item = file.make(number, file.rows[number])
        if isinstance(item, Drop):
            reason = item.reason
            if item.is_error:
                raise DataError(f"{file.rows.where(number)}: {reason}")
            continue
        kept.append(item)
        if len(kept) == config.eval.num_prompts:
            break
    if not kept:
        raise DataError(f"{file.rows.path}: all {len(file.rows)} rows are dropped because {reason}")
    return file.batch(kept)


def _limit(config: ActorConfig) -> str:
    return f"actor_rollout.max_prompt_length={config.max_prompt_length}"
