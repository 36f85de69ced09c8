"""The token that ends an answer: of every shipped chat template, of tokenizers' own ones, and of plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxf.assembly.data import open_preferences
from rlxf.core.types import Messages
from rlxf.data.templates import TEMPLATE_NAMES, chat_template
from rlxf.models.endings import Endings
from tests.data_world import CHAT_TEMPLATE, chat_tokenizer, recipe, write_rows
from tests.reward_world import KINDS, tokenizer_of

ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|eos|>", "<|user|>", "<|observation|>")
# What each shipped template writes behind an answer; the two that write nothing have no end.
END_OF = dict.fromkeys(TEMPLATE_NAMES, "</s>") | {
    "empty": "",
    "trl": "",
    "gemma": "<end_of_turn>",
    "hunyuan": "<|eos|>",
}
END_OF |= dict.fromkeys(("chatml", "chatml_de", "intern2", "qwen", "qwen_math_r1", "qwen_r1"), "<|im_end|>")
END_OF |= {"llama3": "<|eot_id|>"}

_words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.just("\n"), max_size=12)


def said(first: str) -> st.SearchStrategy[str]:
    return _words.map(lambda text: f"{first}{text}.")  # templates may trim the ends of a message


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, Messages]:
    """A row of chat messages; the chosen side may go over several turns."""
    answers = draw(st.lists(said("c"), min_size=1, max_size=3))
    turns = [assistant(answers[0])]
    for answer in answers[1:]:
        turns += [user("more?"), assistant(answer)]
    return {"prompt": [user(draw(said("q")))], "chosen": turns, "rejected": [assistant(draw(said("r")))]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def trained_on(rows: list[dict[str, Messages]], tokenizer: Any, folder: Path, ends: tuple[str, ...]) -> list[list[str]]:
    """Chosen and rejected texts of each row, as stage rm sees them."""
    actor = {"model": "tiny", "seq_length": 4096, "max_prompt_length": 2048, "eos_tokens": ends, "no_shuffle": True}
    actor["data_path"] = str(write_rows(folder / "pairs.jsonl", rows))
    config = recipe(training={"stage": "rm", "global_batch_size": len(rows)}, actor_rollout=actor)
    batch = open_preferences(config, tokenizer).next_batch(0)
    sides = [side.rows() for side in (batch.chosen, batch.rejected)]
    return [
        [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in row] for row in zip(*sides, strict=True)
    ]


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(pairs(), min_size=8, max_size=8))
def test_every_shipped_template_is_trained_at_its_end_of_turn(
    name: str, named: bool, rows: list[dict[str, Messages]], tmp_path: Path
) -> None:
    """``named``: the recipe's ``eos_tokens`` are those of the template, as ``prompt_type`` sets them; else none."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = chat_template(name).jinja or CHAT_TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": list(ENDS)})
    ends = chat_template(name).eos_tokens if named else ()
    for row, texts in zip(rows, trained_on(rows, tokenizer, tmp_path, ends), strict=True):
        for side, text in zip(("chosen", "rejected"), texts, strict=True):
            assert text.endswith(row[side][-1]["content"] + END_OF[name])


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.template])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(pairs(), min_size=8, max_size=8))
def test_a_tokenizers_own_template_is_trained_at_its_end_of_turn(
    kind: Any, rows: list[dict[str, Messages]], tmp_path: Path
) -> None:
    for row, texts in zip(rows, trained_on(rows, tokenizer_of(kind), tmp_path, ()), strict=True):
        for side, text in zip(("chosen", "rejected"), texts, strict=True):
            assert text.endswith(row[side][-1]["content"] + kind.end)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("yes<|im_end|>", "yes<|im_end|>"),
        ("yes<|im_end|>\n", "yes<|im_end|>"),
        ("yes\n<|im_end|>\n", "yes\n<|im_end|>"),
        ("yes<|im_end|> \n</s>", "yes<|im_end|>"),  # an end of the document behind the turn's
        ("yes</s></s>", "yes</s>"),
        ("yes\n", "yes\n"),  # cut
        ("no<|im_end|>\nyes<|im_end|>\n", "no<|im_end|>\nyes<|im_end|>"),
        ("no<|im_end|>\n<|im_start|>assistant\nyes", "no<|im_end|>\n<|im_start|>assistant\nyes"),  # its last turn cut
        ("", ""),
    ],
)
def test_an_answer_ends_where_sampling_would_have_stopped(text: str, read: str) -> None:
    tokenizer = tokenizer_of(KINDS["chatml"])
    ids = tokenizer(text)["input_ids"]
    endings = Endings(tokenizer, tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert tokenizer.decode(endings.cut(ids)) == read


def test_a_template_writes_its_tail_behind_the_end() -> None:
    for kind in KINDS.values():
        tokenizer = tokenizer_of(kind)
        assert tokenizer.decode(Endings.of(tokenizer, None).tail) == kind.tail


def test_a_template_that_refuses_a_plain_question_has_neither_end_nor_tail() -> None:
    tokenizer = tokenizer_of(KINDS["text"])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    endings = Endings.of(tokenizer, None)
    assert endings.tail == []
    assert endings.find([9, tokenizer.eos_token_id]) == 1
