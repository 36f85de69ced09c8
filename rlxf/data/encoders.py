"""Rows of a data file to rows of token ids, many at a time, as the handlers of the preprocessing write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rlxf.core.errors import DataError, ModelError
from rlxf.core.jsonl import Row, describe
from rlxf.core.types import Messages
from rlxf.data.batches import DropReason
from rlxf.data.fields import BadRow, common_start
from rlxf.data.handlers import Columns
from rlxf.data.text import text_problem
from rlxf.data.tokenized import IGNORED
from rlxf.data.turns import encode_many_turns
from rlxf.models.encoding import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = dict[str, list[int]]  # one row of the output: a key of the files -> token ids, labels or mask


class Encoder(Protocol):
    """Turns rows into token ids."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the rows that come out."""
        ...

    def __call__(self, rows: Sequence[Row]) -> list[Ids | DropReason]:
        """One result for each row: its token ids, or why there are none; ``is_error`` marks a bad row."""
        ...


class TextEncoder:
    """Whole texts, tokenized by the tokenizer's own rule, as pre-training takes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keys: tuple[str, ...], *, append_eod: bool = False) -> None:
        self.keys = keys
        self._tokenizer = tokenizer
        self._append_eod = append_eod

    def __call__(self, rows: Sequence[Row]) -> list[Ids | DropReason]:
        problems = [self._problem(row) for row in rows]
        good = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
        columns = [self._encode([row[key] for row in good]) for key in self.keys]
        made = iter(zip(*columns, strict=True))
        return [
            dict(zip(self.keys, next(made), strict=True)) if problem is None else DropReason(problem, is_error=True)
            for problem in problems
        ]

    def _problem(self, row: Row) -> str | None:
        return next((problem for key in self.keys if (problem := _string_problem(row, key))), None)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows = encode_texts(self._tokenizer, texts, add_special_tokens=True)
        end = self._tokenizer.eos_token_id
        return [_with_end(ids, end, {end}) for ids in rows] if self._append_eod else rows


class ChatEncoder:
    """Conversations - prompts, preference pairs or examples - as the tokenizer's chat template writes them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Columns,
        *,
        append_eod: bool = False,
        end_tokens: Sequence[str] = (),
        additional_keys: Sequence[str] = (),
    ) -> None:
        """``end_tokens``: end a turn besides EOS. ``additional_keys``: columns whose texts become files of their own.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template of its own; name one with --prompt-type"
            )
        self.keys = (*columns.handler.keys, *additional_keys)
        self._tokenizer = tokenizer
        self._columns = columns
        self._layout = columns.layout()
        self._makes = columns.handler.makes
        self._append_eod = append_eod
        self._ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(end_tokens))}
        self._additional_keys = tuple(additional_keys)

    def __call__(self, rows: Sequence[Row]) -> list[Ids | DropReason]:
        results: list[Ids | DropReason | None] = [None] * len(rows)
        chats: list[tuple[Messages, ...]] = []
        additional: list[list[str]] = []
        for index, row in enumerate(rows):
            try:
                chat = self._chats(self._columns.with_standard_tags(row))
                additional.append([self._additional(row, key) for key in self._additional_keys])
                chats.append(chat)
            except BadRow as error:
                results[index] = DropReason(str(error), is_error=True)
        made = iter(self._encode(chats, additional))
        return [next(made) if result is None else result for result in results]

    def _chats(self, row: Row) -> tuple[Messages, ...]:
        """The prompt; or prompt, prompt with chosen, and prompt with rejected; or the whole example."""
        if self._makes == "prompt":
            return (_messages(self._layout.prompt(row)),)
        if self._makes == "example":
            prompt, completion = self._layout.example(row)
            return (_messages(prompt) + _messages(completion),)
        prompt, chosen, rejected = self._columns.listed_pair(row) or self._layout.pair(row)
        asked = _messages(prompt)
        return asked, asked + _messages(chosen), asked + _messages(rejected)

    def _additional(self, row: Row, key: str) -> str:
        """The text of another column; "labels" is the answer, as in MindSpeed-LLM's handlers."""
        if key == "labels":
            return _messages(self._layout.example(row)[1])[-1]["content"]
        if problem := _string_problem(row, key):
            raise BadRow(problem)
        return str(row[key])

    def _encode(self, chats: list[tuple[Messages, ...]], additional: list[list[str]]) -> list[Ids | DropReason]:
        try:
            made = self._encode_all(chats)
        except DataError as error:
            if len(chats) == 1:
                return [DropReason(str(error), is_error=True)]
            pairs = zip(chats, additional, strict=True)  # which of them it is
            return [result for chat, texts in pairs for result in self._encode([chat], [texts])]
        for ids, texts in zip(made, additional, strict=True):
            if not isinstance(ids, DropReason):
                rows = encode_texts(self._tokenizer, texts)
                ids.update(zip(self._additional_keys, rows, strict=True))
        return made

    def _encode_all(self, chats: list[tuple[Messages, ...]]) -> list[Ids | DropReason]:
        if not chats:
            return []
        if self._makes == "example":
            turns = encode_many_turns(self._tokenizer, [chat for (chat,) in chats])
            return [self._example(ids, counted) for ids, counted in turns]
        asked = encode_texts(self._tokenizer, self._render([chat[0] for chat in chats], add_generation_prompt=True))
        if self._makes == "prompt":
            return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in asked]
        answers = encode_texts(self._tokenizer, self._render([side for chat in chats for side in chat[1:]]))
        return list(map(self._pair, asked, answers[::2], answers[1::2]))

    def _render(self, chats: list[Messages], **options: bool) -> list[str]:
        texts: list[str] = apply_template(self._tokenizer, chats, tokenize=False, **options)
        return texts

    def _example(self, ids: list[int], counted: list[bool]) -> Ids | DropReason:
        if not any(counted[1:]):  # no token precedes the first one to predict it
            return DropReason("it holds no token that the loss counts")
        labels = [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)]
        if self._append_eod:
            ended = _with_end(ids, self._tokenizer.eos_token_id, self._ends)
            labels, ids = labels + ended[len(ids) :], ended
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _pair(self, asked: list[int], chosen: list[int], rejected: list[int]) -> Ids | DropReason:
        """The prompt ends at the first token that its answers change, as in training from text."""
        if chosen == rejected:
            return DropReason("chosen and rejected are the same tokens")
        shared = min(common_start(asked, chosen), common_start(asked, rejected))
        if self._append_eod:
            eos = self._tokenizer.eos_token_id
            chosen, rejected = (_with_end(ids, eos, self._ends) for ids in (chosen, rejected))
        return {
            "chosen_input_ids": chosen,
            "chosen_labels": [IGNORED] * shared + chosen[shared:],
            "rejected_input_ids": rejected,
            "rejected_labels": [IGNORED] * shared + rejected[shared:],
        }


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of many texts in one call, which is what makes a tokenizer fast."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # The same ids without the offsets, masks and word numbers that a BatchEncoding holds: a quarter faster.
        return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False)[
        "input_ids"
    ]
    return ids


def _string_problem(row: Row, key: str) -> str | None:
    if isinstance(row.get(key), str):
        return text_problem(row[key], f"field {key!r}")
    return f"field {key!r}: expected a string, got {describe(row.get(key))}"


def _messages(text: Any) -> Messages:
    assert isinstance(text, list)  # both layouts make chat messages of everything
    return text


def _with_end(ids: list[int], eos: int, ends: set[int]) -> list[int]:
    return ids if ids and ids[-1] in ends else [*ids, eos]
