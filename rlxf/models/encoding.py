"""Texts and chat messages to token ids, the same way for training and for scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlxf.core.errors import DataError, RlxfError
from rlxf.core.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_string(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that will be continued, with the special tokens of the tokenizer's own rule, each once.

    The rule is the tokenizer's post-processor (`tokenizer.json`): one that adds BOS gives a prompt its BOS. A text that
    already starts with BOS gets no second one. An EOS that the rule appends is left out, because a prompt is not the
    end of a text.
    """
    ids: list[int] = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids[:2] == [bos, bos]:
        ids = ids[1:]
    num_eos = int(eos is not None and text.endswith(tokenizer.eos_token))  # that the text itself ends with
    if ids[-1 - num_eos :] == [eos] * (num_eos + 1):
        ids = ids[:-1]
    return ids


def with_eos(text: str, eos: str) -> str:
    """A whole text, which ends with exactly one EOS."""
    return text if text.endswith(eos) else text + eos


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **template: bool) -> list[int]:
    """Token ids of chat messages: the chat template applied once, which writes all special tokens itself.

    Raises:
        DataError: the template refuses the messages.
    """
    return list(apply_template(tokenizer, messages, tokenize=True, return_dict=True, **template)["input_ids"])


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages | list[Messages], **options: bool) -> Any:
    """What ``apply_chat_template`` gives for chat messages, or for a list of conversations.

    Raises:
        DataError: the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:  # a template is a program: it may raise anything on a conversation that it refuses
        raise DataError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from error
