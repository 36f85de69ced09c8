"""Where an answer ends: the token at which a reward model is trained, and read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlxf.core.errors import DataError
from rlxf.core.types import Messages
from rlxf.models.encoding import apply_template, encode_chat
from rlxf.models.tokenizer import declared_eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "an-answer"
_CHAT: Messages = [{"role": "user", "content": "a-question"}, {"role": "assistant", "content": _ANSWER}]


class Endings:
    """The tokens that end an answer, in the ids of one tokenizer.

    They are the EOS ids, and the token that the chat template writes behind an answer: the tokenizer of a base model
    often has a chat template whose end of turn is not its EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> None:
        """``ids``: further ones, such as those that end a completion of the policy."""
        self._tokenizer = tokenizer
        self._ids = {*ids, *_end_of_turn(tokenizer)}
        self._blank: dict[int, bool] = {}

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path | None,
        *,
        tokens: Sequence[str] | None = (),
        ids: Collection[int] = (),
    ) -> Endings:
        """Those of a model folder.

        Args:
            tokenizer: of the texts.
            folder: whose config files name EOS ids; None: there is none.
            tokens: further ones by name, as ``actor_rollout.eos_tokens`` has them.
            ids: further ones.
        """
        return cls(tokenizer, {*declared_eos_ids(folder, tokenizer, tokens), *ids})

    def find(self, ids: Sequence[int]) -> int | None:
        """Index of the token that ends the answer at the end of ``ids``; None if the answer has no end.

        It is the first of the end tokens and white space that close ``ids``, because sampling stops at the first one.
        A template may write more behind it: a line break (ChatML), or an EOS of the whole conversation.
        """
        place = None
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self._ids:
                place = index
            elif not self._is_blank(ids[index]):
                break
        return place

    def cut(self, ids: list[int]) -> list[int]:
        """``ids`` up to the token that ends the answer; all of them if it has no end."""
        place = self.find(ids)
        return ids if place is None else ids[: place + 1]

    @cached_property
    def tail(self) -> list[int]:
        """What the chat template writes behind the end of the last turn; empty without a template."""
        if not self._tokenizer.chat_template:
            return []
        try:
            ids = encode_chat(self._tokenizer, _CHAT)
        except DataError:
            return []
        place = self.find(ids)
        return [] if place is None else ids[place + 1 :]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the chat template writes first behind an answer; none if it writes ordinary text or nothing."""
    if not tokenizer.chat_template:
        return []
    try:
        text: str = apply_template(tokenizer, _CHAT, tokenize=False)
    except DataError:  # a template that wants other messages
        return []
    behind = text.rpartition(_ANSWER)[2]
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return [token for token in ids if token in tokenizer.added_tokens_decoder][:1]
