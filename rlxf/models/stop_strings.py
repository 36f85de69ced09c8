"""Texts that end a completion, found in its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlxf.core.types import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = "�"  # what a tokenizer writes for a part of a character


class StopStrings:
    """Where completions end by ``rollout.stop``: behind the token that completes one of the texts.

    It depends on nothing but the completion's tokens, so that engines, replays and resumed runs agree. Special tokens
    are part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)

    def __bool__(self) -> bool:
        return bool(self.stop)

    def reader(self) -> StopReader:
        """For one completion, token by token."""
        return StopReader(self)

    def end(self, tokens: Sequence[int]) -> int | None:
        """How many of the tokens belong to the completion that ends with the first stop string; None without one.

        With ``stop = ["##"]`` and the tokens of "ok", " #", "#!", "more": 3.
        """
        if not self.stop:
            return None
        reader = self.reader()
        return next((number for number, token in enumerate(tokens, 1) if reader.add(token)), None)

    def completed(self, sequences: Sequences) -> Tensor:
        """[B] bool: whether the last token of each completion completes its first stop string."""
        ends = [self.end(row) == len(row) for row in sequences.completion_rows()]
        return torch.tensor(ends, dtype=torch.bool)


class StopReader:
    """The text of one completion so far, as far as a stop string may still begin in it.

    A token's text may depend on the tokens before it (a space, a part of a character), so two stretches are decoded:
    the tokens of which the text is known last, and the same with the new ones behind them.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._decode, self._stop = stops.tokenizer.decode, stops.stop
        self._longest = max(map(len, stops.stop), default=0)
        self._known: list[int] = []  # tokens whose text was added last
        self._new: list[int] = []  # tokens behind them, whose text is not whole
        self._tail = ""

    def add(self, token: int) -> bool:
        """Whether the text has a stop string now, which it did not have before this token."""
        self._new.append(token)
        before, after = self._text(self._known), self._text([*self._known, *self._new])
        if len(after) <= len(before) or after.endswith(_CUT):
            return False
        text = self._tail + after[len(before) :]
        self._known, self._new = self._new, []
        self._tail = text[-(self._longest - 1) :] if self._longest > 1 else ""
        return any(stop in text for stop in self._stop)

    def _text(self, tokens: list[int]) -> str:
        text: str | list[str] = self._decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list of tokens
        return text
