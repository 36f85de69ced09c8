"""Completions token by token, with what the policy and the reference say of each token: what people look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlxf.core.jsonl import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = "\N{REPLACEMENT CHARACTER}"  # where the last bytes of a completion are no whole character
_DIGITS = 4  # of log-probabilities and their sums in a file for people


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special tokens included; together they are the completion's text.

    A character that is made of several tokens stands at its last one, and the others are empty.
    """
    if not tokenizer.is_fast:
        return [tokenizer.decode([token]) for token in tokens]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    found = [stream.step(tokenizer.backend_tokenizer, token) for token in tokens]
    if found and found[-1] is None:
        found[-1] = _CUT
    return [piece or "" for piece in found]


def rounded(nats: Sequence[float]) -> list[float | None]:
    """For a file: with few digits, and null where unknown."""
    return [round(value, _DIGITS) if math.isfinite(value) else None for value in nats]


def beside_reference(logps: Sequence[float], reference: Sequence[float]) -> float | None:
    """Sum of the log-ratios of a completion, nats: an estimate of its KL. None where a log-prob is unknown."""
    total = math.fsum(own - other for own, other in zip(logps, reference, strict=True))
    return round(total, _DIGITS) if math.isfinite(total) else None


def answer(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], logps: Sequence[float], reference: Sequence[float]
) -> Row:
    """A completion as a row of a file holds it: tokens, log-probs of both models, and its KL."""
    return {
        "kl": beside_reference(logps, reference),
        "tokens": pieces(tokenizer, tokens),
        "logps": rounded(logps),
        "reference_logps": rounded(reference),
    }
