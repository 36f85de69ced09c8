"""A completion ends with the token that completes the first of its stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlxf.core.types import Sequences
from rlxf.models.stop_strings import StopStrings
from tests.tiny_models import EOS, byte_tokenizer

BYTES = byte_tokenizer()


def spaced() -> PreTrainedTokenizerFast:
    """Words with their spaces as sentencepiece has them: the text of a token depends on whether it is the first."""
    vocabulary = {token: number for number, token in enumerate(["</s>", "\u2581a", "\u2581b", "b", "#", "##", "a#b"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


SPACED = spaced()


def by_whole_texts(tokenizer: PreTrainedTokenizerFast, stop: list[str], tokens: list[int]) -> int | None:
    """The definition: decode everything again after each token."""
    for number in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:number], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if any(part in text for part in stop):
            return number
    return None


@settings(max_examples=200, deadline=None)
@given(st.text("ab# é", max_size=12), st.lists(st.text("ab#é", min_size=1, max_size=3), min_size=1, max_size=3))
def test_bytes_end_where_the_whole_text_first_has_a_stop_string(text: str, stop: list[str]) -> None:
    tokens = BYTES(text)["input_ids"]
    assert StopStrings(BYTES, stop).end(tokens) == by_whole_texts(BYTES, stop, tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=10),
    st.lists(st.sampled_from(["##", "b#", " a", "a b", "</s>", "#b"]), min_size=1, max_size=3),
)
def test_words_end_where_the_whole_text_first_has_a_stop_string(tokens: list[int], stop: list[str]) -> None:
    assert StopStrings(SPACED, stop).end(tokens) == by_whole_texts(SPACED, stop, tokens)


def test_the_last_token_may_hold_more_than_the_stop_string() -> None:
    assert StopStrings(SPACED, ["a#"]).end([1, 6, 4]) == 2


def test_a_special_token_is_part_of_the_text() -> None:
    assert StopStrings(BYTES, ["</s>"]).end([*BYTES("ab")["input_ids"], EOS, 5]) == 3


@pytest.mark.parametrize(("text", "ended"), [("a#", True), ("a#b", False), ("ab", False), ("", False)])
def test_only_a_completion_that_ends_there_is_complete(text: str, ended: bool) -> None:
    sequences = Sequences.from_rows([BYTES("#")["input_ids"]], [BYTES(text)["input_ids"]])
    assert StopStrings(BYTES, ["#"]).completed(sequences).tolist() == [ended]


def test_without_stop_strings_nothing_is_decoded() -> None:
    stops = StopStrings(BYTES, ())
    assert not stops
    assert stops.end([4, 5]) is None
