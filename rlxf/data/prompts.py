"""Prompts of a run and of its evaluations, tokenized once, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from rlxf.config.roles import DataConfig
from rlxf.core.jsonl import Row
from rlxf.core.types import PromptBatch, Tokens
from rlxf.data.batches import DropReason
from rlxf.data.formats import Layout
from rlxf.data.source import DataSource
from rlxf.data.text import encode_prompt, shorten_left
from rlxf.data.tokenized import Content, TokenIds


class PromptRecord(NamedTuple):
    """The content of a row."""

    text: Content
    columns: Row  # those that are not in the prompt


class Prompt(NamedTuple):
    """One prompt, ready for a batch."""

    row: int
    record: PromptRecord
    ids: list[int]


class PromptFile(DataSource[PromptRecord, Prompt, PromptBatch]):
    """Prompts: ``global_batch_size`` per step."""

    task = "prompt"
    ends_with_eos = False

    def next_batch(self, step: int) -> PromptBatch:
        """The prompts of a step, with their places in the run. Earlier requests do not change them."""
        start = step * self._batch_size
        return replace(super().next_batch(step), positions=torch.arange(start, start + self._batch_size))

    def _take(self, layout: Layout, row: Row) -> PromptRecord:
        text = layout.prompt(row)
        columns = {name: row[name] for name in row.keys() - layout.prompt_columns}
        if isinstance(text, TokenIds):
            columns = {name: TokenIds(ids) for name, ids in columns.items()}
        return PromptRecord(text, columns)

    def _text(self, record: PromptRecord) -> Content:
        return record.text

    def _make(self, row: int, record: PromptRecord) -> Prompt | DropReason:
        config = self._config
        text = record.text
        ids = text.ids if isinstance(text, TokenIds) else encode_prompt(self._tokenizer, text)
        if not ids:
            return DropReason("the prompt gives no tokens")
        if len(ids) > config.max_prompt_length:
            if config.prompt_overflow == "error":
                return DropReason(f"the prompt has {len(ids)} tokens, more than {_limit(config)}", is_error=True)
            if config.prompt_overflow == "drop":
                return DropReason(f"the prompt is longer than {_limit(config)}")
            ids = shorten_left(ids, config.max_prompt_length, self._tokenizer.bos_token_id)
        return Prompt(row, record, ids)

    def _collate(self, items: Sequence[Prompt]) -> PromptBatch:
        """A batch of these prompts, with their row numbers; a column that a row lacks is None there."""
        rows = torch.tensor([item.row for item in items], dtype=torch.int64)
        return PromptBatch(
            prompts=Tokens.from_rows([item.ids for item in items]),
            row_ids=rows,
            positions=rows,
            texts=tuple(self._readable(item.record.text) for item in items),
            columns={
                name: [self._readable(item.record.columns.get(name)) for item in items] for name in self._table.columns
            },
        )

    def _readable(self, value: Any) -> Any:
        """The text itself, or the text that token ids stand for."""
        return self._tokenizer.decode(value.ids) if isinstance(value, TokenIds) else value


def _limit(config: DataConfig) -> str:
    return f"actor_rollout.max_prompt_length={config.max_prompt_length}"
