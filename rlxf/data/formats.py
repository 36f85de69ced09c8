"""The column layouts that a data row may have, each turned into the same few texts: strings or chat messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rlxf.config.kinds import DataFormat
from rlxf.config.roles import DataConfig
from rlxf.core.jsonl import Row, describe
from rlxf.core.types import Messages, Text
from rlxf.data.fields import (
    BadRow,
    Example,
    Pair,
    asks,
    at_first_answer,
    prompt_field,
    require_answer,
    require_assistant,
    require_one_kind,
    shared_start,
    text_field,
    up_to_the_answer,
)
from rlxf.data.instructions import ALPACA, Alpaca, ShareGpt
from rlxf.data.text import is_chat
from rlxf.data.tokenized import Content, is_tokenized, tokenized_layout

Task = Literal["prompt", "pair", "example"]  # what a stage makes of a row


class Layout(Protocol):
    """One format: which columns hold what. Every method raises `BadRow` where the row does not hold it."""

    @property
    def prompt_columns(self) -> frozenset[str]:
        """Columns that the prompt contains completely; all others go to reward functions."""
        ...

    def prompt(self, row: Row) -> Content: ...

    def pair(self, row: Row) -> tuple[Content, Content, Content]: ...

    def example(self, row: Row) -> tuple[Content, Content]: ...


def find_layout(row: Row, config: DataConfig, task: Task) -> Layout:
    """The format of a row: ``actor_rollout.data_format``, or what the names of its columns say."""
    if is_tokenized(row):
        return tokenized_layout(row)
    name: DataFormat = _format_name(row, config, task) if config.data_format == "auto" else config.data_format
    return _LAYOUTS[name](row, config)


def _format_name(row: Row, config: DataConfig, task: Task) -> DataFormat:
    has = {name for name, value in row.items() if value is not None}
    if config.map_keys is not None:
        conversation = row.get(config.map_keys.get("prompt", "conversations"))
        return "sharegpt" if _is_conversation(conversation) else "alpaca"
    needs = {"prompt": set(), "pair": {config.chosen_key, config.rejected_key}, "example": {"completion"}}[task]
    if {config.prompt_key, *needs} <= has:
        return "standard"
    if task != "pair" and "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    return "alpaca" if "instruction" in has else "standard"


@dataclass(frozen=True, slots=True)
class Standard:
    """``prompt``, ``completion``, ``chosen``, ``rejected``, each a string or chat messages.

    Chosen and rejected may begin with the prompt, if the row has no prompt of the same kind.
    """

    prompt_key: str
    chosen_key: str
    rejected_key: str
    implicit: bool  # the first row has no prompt column

    @property
    def prompt_columns(self) -> frozenset[str]:
        return frozenset((self.prompt_key,))

    def prompt(self, row: Row) -> Text:
        if row.get(self.prompt_key) is None and self._is_implicit(row):
            return self.pair(row)[0]
        return prompt_field(row, self.prompt_key)

    def pair(self, row: Row) -> Pair:
        chosen, rejected = text_field(row, self.chosen_key), text_field(row, self.rejected_key)
        if self._is_implicit(row):
            prompt, chosen, rejected = shared_start(chosen, rejected)
        else:
            prompt = prompt_field(row, self.prompt_key)
        require_one_kind(prompt=prompt, chosen=chosen, rejected=rejected)
        if isinstance(prompt, list):
            if not prompt:
                raise BadRow(
                    "there is no prompt field, and the chosen and rejected conversations start differently: no common "
                    "prompt"
                )
            require_answer("chosen", prompt, chosen)
            require_answer("rejected", prompt, rejected)
        return prompt, chosen, rejected

    def example(self, row: Row) -> Example:
        prompt, completion = prompt_field(row, self.prompt_key), text_field(row, "completion")
        require_one_kind(prompt=prompt, completion=completion)
        if isinstance(prompt, list):
            require_answer("completion", prompt, completion)
            require_assistant(completion)
        return prompt, completion

    def _is_implicit(self, row: Row) -> bool:
        chosen, rejected = row.get(self.chosen_key), row.get(self.rejected_key)
        prompt = row.get(self.prompt_key)
        if is_chat(chosen) and is_chat(rejected):
            return prompt is None or (isinstance(prompt, str) and asks(chosen, rejected, prompt))
        return self.implicit and prompt is None and isinstance(chosen, str) and isinstance(rejected, str)


@dataclass(frozen=True, slots=True)
class ChatMessages:
    """A whole conversation in ``messages``."""

    column: str = "messages"

    @property
    def prompt_columns(self) -> frozenset[str]:
        return frozenset()  # the column also holds the answer, which a reward function may want

    def prompt(self, row: Row) -> Text:
        return up_to_the_answer(self._messages(row), f"field {self.column!r}")

    def pair(self, row: Row) -> Pair:
        raise BadRow(f"one conversation in {self.column!r}, but preference pairs have a chosen and a rejected one")

    def example(self, row: Row) -> Example:
        return at_first_answer(self._messages(row))

    def _messages(self, row: Row) -> Messages:
        messages = text_field(row, self.column)
        if isinstance(messages, str):
            raise BadRow(f"field {self.column!r}: expected a list of chat messages, got {describe(messages)}")
        return messages


def _standard(row: Row, config: DataConfig) -> Layout:
    implicit = row.get(config.prompt_key) is None
    return Standard(config.prompt_key, config.chosen_key, config.rejected_key, implicit=implicit)


def _alpaca(row: Row, config: DataConfig) -> Layout:
    return Alpaca({**ALPACA, **(config.map_keys or {})})


def _sharegpt(row: Row, config: DataConfig) -> Layout:
    return ShareGpt({**ALPACA, "prompt": "conversations", **(config.map_keys or {})})


_LAYOUTS: Mapping[str, Callable[[Row, DataConfig], Layout]] = {
    "standard": _standard,
    "messages": lambda row, config: ChatMessages(),
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]
