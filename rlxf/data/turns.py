"""Token ids of a whole conversation, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlxf.core.errors import DataError
from rlxf.core.types import Messages
from rlxf.data.fields import common_start
from rlxf.models.encoding import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # first character, and the one behind the last


def encode_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template writes the conversation, and of each whether it belongs to the assistant.

    A template that marks the assistant's turns with ``{% generation %}`` decides. Otherwise a turn begins behind the
    template's generation prompt and ends with all that the template writes for it, end-of-turn token included; a token
    that reaches into a turn belongs to it.

    Raises:
        DataError: the template refuses the messages, or writes earlier turns differently once others follow, so that
            nothing tells where a turn is.
    """
    return encode_many_turns(tokenizer, [messages])[0]


def encode_many_turns(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]
) -> list[tuple[list[int], list[bool]]]:
    """``encode_turns`` for many conversations; in one fast call of the tokenizer if the template marks the turns."""
    if not _GENERATION.search(tokenizer.get_chat_template()):
        return [_encode_by_rendering(tokenizer, messages) for messages in chats]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = apply_template(tokenizer, list(chats), **options)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [(list(ids), [bool(mark) for mark in marks]) for ids, marks in pairs]


def _encode_by_rendering(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    text: str = apply_template(tokenizer, messages, tokenize=False)
    spans = [
        _span(tokenizer, messages, i, text) for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), _inside(encoded["offset_mapping"], spans)


def _span(tokenizer: PreTrainedTokenizerBase, messages: Messages, turn: int, text: str) -> Span:
    """Where the text of a conversation holds one of its turns."""
    before: str = apply_template(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    begin = len(before)
    if not text.startswith(before):  # some templates write more into a generation prompt than into a finished turn
        bare: str = apply_template(tokenizer, messages[:turn], tokenize=False)
        _require_start(text, bare, turn)
        begin = common_start(before, text)
    upto: str = apply_template(tokenizer, messages[: turn + 1], tokenize=False)
    _require_start(text, upto, turn + 1)
    return begin, len(upto)


def _require_start(text: str, start: str, num_messages: int) -> None:
    if not text.startswith(start):
        place = common_start(text, start)
        raise DataError(
            f"the chat template writes the first {num_messages} messages differently when others follow (there "
            f"{start[place : place + 20]!r}, here {text[place : place + 20]!r}), so the assistant's turns cannot be "
            "found; use a template that marks them with {% generation %}, or conversations of one turn"
        )


def _inside(offsets: list[Any], spans: list[Span]) -> list[bool]:
    """For each token, whether it reaches into a span. A token without characters does not."""
    marks, spans = [False] * len(offsets), list(spans)
    number = 0
    for index, (begin, end) in enumerate(offsets):
        while number < len(spans) and spans[number][1] <= begin:
            number += 1
        marks[index] = begin < end and number < len(spans) and spans[number][0] < end
    return marks
