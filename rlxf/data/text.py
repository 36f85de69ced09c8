"""What a text may be - a string, or chat messages - and its token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from rlxf.core.errors import ModelError
from rlxf.core.jsonl import describe
from rlxf.core.types import Messages, Text
from rlxf.models.encoding import encode_chat, encode_string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_problem(value: Any, name: str) -> str | None:
    """What is wrong with a text, or None; ``name`` is the field that holds it."""
    if isinstance(value, str):
        return _string_problem(value, name)
    if isinstance(value, list):
        return _messages_problem(value, name)
    return f"{name}: expected a string or a list of chat messages, got {describe(value)}"


def is_chat(value: Any) -> TypeGuard[Messages]:
    return isinstance(value, list)


def _string_problem(text: str, name: str) -> str | None:
    if not text.strip():
        return f"{name} is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name} holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is no character"
    return None


def _messages_problem(messages: list[Any], name: str) -> str | None:
    if not messages:
        return f"{name} is an empty list; expected chat messages"
    for index, message in enumerate(messages):
        place = f"{name}, message {index + 1}"
        if not isinstance(message, dict):
            return f"{place}: expected an object with 'role' and 'content', got {describe(message)}"
        for key in ("role", "content"):
            if key not in message:
                return f"{place}: {key!r} is missing"
            if not isinstance(message[key], str):
                return f"{place}: {key!r} must be a string, got {describe(message[key])}"
        if message["content"] or message["role"] != "system":  # only a system message may be empty
            problem = _string_problem(message["content"], place)
            if problem:
                return problem
    return None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Token ids that an engine continues. A chat that ends with an assistant message has that message continued."""
    if isinstance(prompt, str):
        return encode_string(tokenizer, prompt)
    if prompt[-1]["role"] == "assistant":
        return encode_chat(tokenizer, prompt, add_generation_prompt=False, continue_final_message=True)
    return encode_chat(tokenizer, prompt, add_generation_prompt=True)


def shorten_left(ids: list[int], length: int, bos: int | None) -> list[int]:
    """The last ``length`` ids. A BOS at the start is kept, because the model has seen no text without it."""
    if len(ids) <= length:
        return ids
    if length > 1 and bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Refuse chat messages for a tokenizer that has no template to write them with."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"{file}: holds chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template; use the "
            "instruct model's tokenizer (actor_rollout.tokenizer_name_or_path), or strings instead of messages"
        )
