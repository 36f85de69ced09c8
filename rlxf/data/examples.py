"""Examples of supervised fine-tuning: whole conversations, or a prompt and its completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlxf.core.jsonl import Row
from rlxf.core.types import Examples, Messages, Sequences
from rlxf.data.batches import DropReason
from rlxf.data.fields import common_start
from rlxf.data.formats import Layout
from rlxf.data.source import DataSource
from rlxf.data.text import shorten_left
from rlxf.data.tokenized import Content, TokenIds
from rlxf.data.turns import encode_turns
from rlxf.models.encoding import encode_string, with_eos


class ExampleRecord(NamedTuple):
    """A row's content: two strings; chat messages, cut before the assistant's first turn; or labelled token ids."""

    prompt: Content
    completion: Content


class ExampleIds(NamedTuple):
    """One example, tokenized."""

    ids: list[int]
    counted: list[bool]  # of each token whether the loss counts it


class ExampleFile(DataSource[ExampleRecord, ExampleIds, Examples]):
    """Examples: ``global_batch_size`` per step. The loss counts every turn of the assistant, or the completion.

    A string's completion ends with EOS. An example that is longer than ``seq_length`` is handled as
    ``prompt_overflow`` says; ``max_prompt_length`` is not used.
    """

    task = "example"

    def _take(self, layout: Layout, row: Row) -> ExampleRecord:
        return ExampleRecord(*layout.example(row))

    def _text(self, record: ExampleRecord) -> Content:
        return record.prompt

    def _make(self, row: int, record: ExampleRecord) -> ExampleIds | DropReason:
        config = self._config
        ids, counted = self._encode(record)
        limit = f"actor_rollout.seq_length={config.seq_length}"
        if len(ids) > config.seq_length:
            if config.prompt_overflow == "error":
                return DropReason(f"the example has {len(ids)} tokens, more than {limit}", is_error=True)
            if config.prompt_overflow == "drop":
                return DropReason(f"the example is longer than {limit}")
            bos = 0 if ids[0] == self._tokenizer.bos_token_id else None
            kept = shorten_left(list(range(len(ids))), config.seq_length, bos)
            ids, counted = [ids[i] for i in kept], [counted[i] for i in kept]
        if not any(counted[1:]):  # no token precedes the first one to predict it
            return DropReason("it holds no token that the loss counts")
        return ExampleIds(ids, [False, *counted[1:]])

    def _collate(self, items: Sequence[ExampleIds]) -> Examples:
        cuts = [item.counted.index(True) for item in items]
        return Examples(
            sequences=Sequences.from_rows(
                [item.ids[:cut] for item, cut in zip(items, cuts, strict=True)],
                [item.ids[cut:] for item, cut in zip(items, cuts, strict=True)],
            ),
            counted=torch.tensor([mark for item, cut in zip(items, cuts, strict=True) for mark in item.counted[cut:]]),
        )

    def _encode(self, record: ExampleRecord) -> tuple[list[int], list[bool]]:
        prompt, completion = record
        if isinstance(prompt, TokenIds):
            assert prompt.labels is not None  # the layout gives an example its labels
            return prompt.ids, [token == label for token, label in zip(prompt.ids, prompt.labels, strict=True)]
        if isinstance(prompt, str):
            return self._encode_strings(prompt, f"{prompt}{completion}")
        assert isinstance(completion, list)  # a row's texts are of one kind: checked when the file was opened
        messages: Messages = prompt + completion
        return encode_turns(self._tokenizer, messages)

    def _encode_strings(self, prompt: str, whole: str) -> tuple[list[int], list[bool]]:
        """The completion begins at the first token that differs between the prompt alone and the whole text."""
        alone = encode_string(self._tokenizer, prompt)
        ids = encode_string(self._tokenizer, with_eos(whole, self._tokenizer.eos_token))
        shared = common_start(alone, ids)
        return ids, [False] * shared + [True] * (len(ids) - shared)
