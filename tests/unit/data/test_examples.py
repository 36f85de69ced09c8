"""Examples of supervised fine-tuning: TRL's tokens and marks; every turn of the assistant counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from rlxf.assembly.data import open_examples
from rlxf.core.errors import DataError, ModelError
from rlxf.core.types import Examples
from rlxf.data.examples import ExampleFile
from rlxf.data.turns import encode_turns
from rlxf.models.encoding import encode_chat
from tests.data_world import chat_tokenizer, recipe, write_rows
from tests.tiny_models import BOS, EOS, byte_tokenizer
from tests.unit.data.test_preferences import merging_tokenizer

Row = dict[str, Any]
IGNORED = -100  # TRL's label of a token that the loss does not count

GENERATION = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As some reasoning models have it: thoughts are cut out of earlier turns.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# And as others: the generation prompt opens a thought that a finished turn need not have.
THINKING = FORGETFUL.replace("[assistant]{%", "[assistant]<think>{%")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokenizer_with(template: str) -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TURNS: list[Row] = [
    {"messages": [user("a?"), assistant("b!"), user("cc?"), assistant("dd é!")]},
    {"messages": [{"role": "system", "content": "s"}, user("a?"), assistant("b!")]},
]
CHATS: list[Row] = [
    {"prompt": [user("sky?")], "completion": [assistant("blue")]},
    {"prompt": [user("a"), user("c")], "completion": [assistant("d")]},
]
STRINGS: list[Row] = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "Zwei: ", "completion": "2</s>"},
    {"prompt": "é", "completion": "è and more"},
]
MERGED: list[Row] = [{"prompt": "xa", "completion": "bc"}, {"prompt": "x", "completion": "ab"}]


def examples(rows: list[Row], folder: Path, tokenizer: Any = None, **actor: Any) -> ExampleFile:
    path = write_rows(folder / "examples.jsonl", rows)
    config = recipe(
        training={"stage": "sft", "global_batch_size": len(rows)},
        actor_rollout={"model": "tiny", "max_prompt_length": 4, "data_path": str(path), "no_shuffle": True, **actor},
    )
    return open_examples(config, tokenizer or chat_tokenizer())


def rows_of(batch: Examples) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each sequence, and of each whether the loss counts it."""
    prompts, completions = batch.sequences.prompt_rows(), batch.sequences.completion_rows()
    counted = batch.counted.split(batch.sequences.completion_lengths.tolist())
    return [
        (p + c, [False] * len(p) + marks.tolist()) for p, c, marks in zip(prompts, completions, counted, strict=True)
    ]


def counted_texts(batch: Examples, tokenizer: Any) -> list[list[str]]:
    """Of each sequence the stretches of text that the loss counts."""
    found = []
    for ids, marks in rows_of(batch):
        stretches: list[list[int]] = []
        for index, (token, mark) in enumerate(zip(ids, marks, strict=True)):
            if mark and (index == 0 or not marks[index - 1]):
                stretches.append([])
            if mark:
                stretches[-1].append(token)
        found.append([tokenizer.decode(stretch) for stretch in stretches])
    return found


def trl_rows(rows: list[Row], tokenizer: Any, *, assistant_only: bool) -> list[tuple[list[int], list[bool]]]:
    """What TRL makes of the same rows: its trainer's data preparation, which looks at nothing but the tokenizer."""
    from trl import SFTConfig, SFTTrainer

    trainer = object.__new__(SFTTrainer)
    trainer._tokenizer = tokenizer
    trainer._is_vision_dataset = False
    trainer._is_vlm = False
    args = SFTConfig(output_dir="unused", max_length=None, bf16=False, report_to=[], assistant_only_loss=assistant_only)
    trainer.args = args
    trainer.assistant_only_loss = assistant_only
    trainer.completion_only_loss = not assistant_only
    trainer.chat_template = None
    dataset = datasets.Dataset.from_list(rows)
    prepared = trainer._prepare_dataset(dataset, tokenizer, args, False, None, "train")
    return [(row["input_ids"], [label != IGNORED for label in row["labels"]]) for row in prepared]


@pytest.mark.parametrize(
    ("rows", "tokenizer", "assistant_only"),
    [
        (STRINGS, chat_tokenizer(), False),
        (STRINGS, byte_tokenizer(), False),
        (MERGED, merging_tokenizer(), False),
        (CHATS, chat_tokenizer(), False),
        (TURNS, tokenizer_with(GENERATION), True),
    ],
    ids=["strings with BOS", "strings without BOS", "prompt end merges", "chats", "turns"],
)
def test_tokens_and_marks_equal_those_of_trl(
    rows: list[Row], tokenizer: Any, assistant_only: bool, tmp_path: Path
) -> None:
    ours = rows_of(examples(rows, tmp_path, tokenizer).next_batch(0))
    assert ours == trl_rows(rows, tokenizer, assistant_only=assistant_only)


@pytest.mark.parametrize("template", [None, GENERATION], ids=["by rendering", "by the template's marks"])
def test_every_turn_of_the_assistant_counts_with_its_end(template: str | None, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer() if template is None else tokenizer_with(template)
    batch = examples(TURNS, tmp_path, tokenizer).next_batch(0)
    assert counted_texts(batch, tokenizer) == [["b!</s>", "dd é!</s>"], ["b!</s>"]]
    assert [ids for ids, _ in rows_of(batch)] == [encode_chat(tokenizer, row["messages"]) for row in TURNS]
    assert [tokenizer.decode(ids) for ids in batch.sequences.prompt_rows()] == [
        "<s>[user]a?</s>[assistant]",
        "<s>[system]s</s>[user]a?</s>[assistant]",
    ]


def test_what_the_template_writes_behind_a_turn_counts() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    tokenizer = tokenizer_with(template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    ids, marks = encode_turns(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])
    text = "".join(tokenizer.decode([i]) if mark else "." for i, mark in zip(ids, marks, strict=True))
    assert text.replace(".", "") == "b</s>\nd</s>\n"
    assert ids == encode_chat(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_a_token_that_reaches_into_a_turn_belongs_to_it() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ids, marks = encode_turns(tokenizer, [user("xa"), assistant("bc")])
    assert [tokenizer.decode([i]) for i in ids] == ["x", "ab", "c"]
    assert marks == [False, True, True]


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    plain = [user("a"), assistant("b"), user("c"), assistant("<think>x</think>d")]
    ids, marks = encode_turns(tokenizer, plain)
    assert tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark]) == "b</s><think>x</think>d</s>"
    rows = [{"messages": plain}, {"messages": [user("a"), assistant("<think>x</think>b"), user("c"), assistant("d")]}]
    with pytest.raises(DataError) as raised:
        examples(rows, tmp_path, tokenizer).next_batch(0)
    (line,) = raised.value.problems
    assert line.startswith(f"{tmp_path}/examples.jsonl:2: the chat template writes the first 2 messages differently")
    assert "(there '<think>x</think>b</s', here 'b</s>[user]c</s>[ass')" in line
    assert "{% generation %}" in line


def test_a_generation_prompt_that_says_more_than_a_finished_turn_is_understood() -> None:
    tokenizer = tokenizer_with(THINKING)
    ids, marks = encode_turns(tokenizer, [user("a"), assistant("b")])
    assert tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark]) == "b</s>"
    ids, marks = encode_turns(tokenizer, [user("a"), assistant("<think>x</think>b")])
    assert tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark]) == "x</think>b</s>"


def test_strings_end_with_one_eos_and_begin_with_one_bos(tmp_path: Path) -> None:
    for ids, marks in rows_of(examples(STRINGS, tmp_path).next_batch(0)):
        assert (ids[0], ids.count(BOS), ids[-1], ids.count(EOS)) == (BOS, 1, EOS, 1)
        assert marks == sorted(marks)


LONG: Row = {"messages": [user("q" * 20), assistant("b" * 10)]}
SHORT: Row = {"messages": [user("q"), assistant("b")]}


def test_an_example_that_does_not_fit_is_handled_as_the_recipe_says(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    length = len(encode_chat(tokenizer, LONG["messages"]))
    exact = examples([LONG, SHORT], tmp_path, seq_length=length)
    assert (len(rows_of(exact.next_batch(0))[0][0]), exact.num_dropped) == (length, 0)
    dropping = examples([LONG, SHORT], tmp_path, seq_length=length - 1)
    assert counted_texts(dropping.next_batch(0), tokenizer) == [["b</s>"], ["b</s>"]]
    assert dropping.dropped == {f"the example is longer than actor_rollout.seq_length={length - 1}": 1}
    cutting = examples([LONG, SHORT], tmp_path, seq_length=length - 2, prompt_overflow="truncate_left")
    ids, marks = rows_of(cutting.next_batch(0))[0]
    assert tokenizer.decode(ids) == "<s>ser]" + "q" * 20 + "</s>[assistant]" + "b" * 10 + "</s>"
    assert len(ids) == length - 2
    assert tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark]) == "b" * 10 + "</s>"
    with pytest.raises(DataError, match=rf"examples\.jsonl:1: the example has {length} tokens, more than .*seq_length"):
        examples([LONG, SHORT], tmp_path, seq_length=length - 1, prompt_overflow="error")


def test_a_cut_into_the_answer_keeps_marks_beside_their_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    row = {"messages": [user("q" * 20), assistant("abcdefghij")]}
    (ids, marks), _ = rows_of(
        examples([row, SHORT], tmp_path, tokenizer, seq_length=6, prompt_overflow="truncate_left").next_batch(0)
    )
    assert tokenizer.decode(ids) == "fghij</s>"
    assert marks == [False] + [True] * 5  # nothing comes before the first token that could predict it


def test_parts_epochs_and_evaluation_work_as_for_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(10)]
    path = write_rows(tmp_path / "examples.jsonl", rows)
    config = recipe(
        training={"stage": "sft", "global_batch_size": 4},
        actor_rollout={"model": "tiny", "data_path": str(path), "split": "80,20,0"},
    )
    training, validation = (open_examples(config, chat_tokenizer(), part) for part in ("train", "valid"))  # type: ignore[arg-type]
    assert (len(training), training.num_kept(), training.epoch(1)) == (8, 8, 1.0)
    assert sorted(training.row_ids(0) + training.row_ids(1)) == list(range(8))
    (batch,) = validation.eval_batches()
    assert [chat_tokenizer().decode(ids) for ids, _ in rows_of(batch)] == ["<s>8x</s>", "<s>9x</s>"]


def test_chats_need_a_template_and_strings_an_eos(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        examples(TURNS, tmp_path, byte_tokenizer())
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos_token"):
        examples(STRINGS, tmp_path, tokenizer)
