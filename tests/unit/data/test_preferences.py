"""Preference pairs: the tokens are those of TRL's DPOTrainer; what cannot be trained on is dropped and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from rlxf.assembly.data import open_preferences
from rlxf.core.errors import DataError, ModelError
from rlxf.core.types import Pairs, RewardPairs
from rlxf.data.preferences import PreferenceFile
from tests.data_world import chat_tokenizer, recipe, write_rows
from tests.tiny_models import BOS, EOS, byte_tokenizer

Row = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


STRINGS: list[Row] = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "Zwei: ", "chosen": "2</s>", "rejected": "two"},
    {"prompt": "é", "chosen": "è and more", "rejected": "ë"},
]
CHATS: list[Row] = [
    {"prompt": [user("sky?")], "chosen": [assistant("blue")], "rejected": [assistant("green")]},
    {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("d"), user("e"), assistant("f")],
        "rejected": [assistant("g")],
    },
]
IMPLICIT_STRINGS: list[Row] = [
    {"chosen": "Human: sky? Assistant: I say blue", "rejected": "Human: sky? Assistant: You know"},
    {"chosen": "Q: é A:a", "rejected": "Q: é A:bc"},
    {"chosen": "one two three", "rejected": "one two thirty"},
]
IMPLICIT: list[Row] = [
    {"chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("green")]},
    {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
]


def preferences(
    rows: list[Row], folder: Path, tokenizer: Any = None, *, stage: str = "dpo", **actor: Any
) -> PreferenceFile:
    path = write_rows(folder / "pairs.jsonl", rows)
    config = recipe(
        training={"stage": stage, "global_batch_size": len(rows)},
        actor_rollout={"model": "tiny", "max_prompt_length": 64, "data_path": str(path), "no_shuffle": True, **actor},
    )
    return open_preferences(config, tokenizer or chat_tokenizer())


def rows_of(pairs: Pairs) -> list[tuple[list[int], list[int], list[int]]]:
    sides = (pairs.chosen.prompt_rows(), pairs.chosen.completion_rows(), pairs.rejected.completion_rows())
    assert pairs.rejected.prompt_rows() == sides[0]
    return list(zip(*sides, strict=True))


def trl_rows(rows: list[Row], tokenizer: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """What TRL makes of the same rows: its trainer's data preparation, which looks at nothing but the tokenizer."""
    from trl import DPOConfig, DPOTrainer

    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = DPOConfig(output_dir="unused", max_length=None, bf16=False, report_to=[])
    prepared = trainer._prepare_dataset(datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared]


def merging_tokenizer() -> Any:
    """A byte tokenizer that merges "a" and "b" to one token, so that a prompt's last token depends on what follows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = byte_tokenizer().get_vocab()
    backend = Tokenizer(models.BPE(vocab={**vocab, "ab": len(vocab)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


MERGED: list[Row] = [
    {"prompt": "xa", "chosen": "bc", "rejected": "cc"},
    {"prompt": "x", "chosen": "ab", "rejected": "b"},
]


@pytest.mark.parametrize(
    ("rows", "tokenizer"),
    [
        (STRINGS, chat_tokenizer()),
        (STRINGS, byte_tokenizer()),
        (CHATS, chat_tokenizer()),
        (IMPLICIT, chat_tokenizer()),
        (IMPLICIT_STRINGS, chat_tokenizer()),
        (MERGED, merging_tokenizer()),
    ],
    ids=[
        "strings with BOS",
        "strings without BOS",
        "chats",
        "implicit prompts",
        "implicit prompts in strings",
        "prompt end merges",
    ],
)
def test_tokens_equal_those_of_trl(rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    ours = rows_of(preferences(rows, tmp_path, tokenizer).next_batch(0))
    theirs = [row for start in range(len(rows)) for row in trl_rows(rows[start : start + 1], tokenizer)]
    assert ours == theirs


def test_strings_end_with_one_eos_and_begin_with_one_bos(tmp_path: Path) -> None:
    for prompt, chosen, rejected in rows_of(preferences(STRINGS, tmp_path).next_batch(0)):
        assert prompt[0] == BOS
        assert [ids.count(BOS) for ids in (prompt, chosen, rejected)] == [1, 0, 0]
        assert [ids.count(EOS) for ids in (prompt, chosen, rejected)] == [0, 1, 1]
        assert chosen[-1] == rejected[-1] == EOS


def test_a_side_is_what_its_column_says(tmp_path: Path) -> None:
    rows = [{"q": "p", "good": "yes", "bad": "no"}]
    file = preferences(rows, tmp_path, prompt_key="q", chosen_key="good", rejected_key="bad")
    ((prompt, chosen, rejected),) = rows_of(file.next_batch(0))
    assert [chat_tokenizer().decode(ids) for ids in (prompt, chosen, rejected)] == ["<s>p", "yes</s>", "no</s>"]


def test_a_pair_of_equal_completions_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "same", "rejected": "same</s>"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    file = preferences(rows, tmp_path, prompt_overflow="error")
    assert [ids[0] for ids in rows_of(file.next_batch(0))] == [chat_tokenizer()("q")["input_ids"]] * 2
    assert file.num_dropped == 1


def test_a_pair_that_does_not_fit_is_handled_as_the_recipe_says(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a" * 20 + "b" * 20, "chosen": "x" * 30, "rejected": "y"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    dropping = preferences(rows, tmp_path, seq_length=50)
    assert len(dropping.next_batch(0)) == 2
    assert dropping.num_dropped == 1
    cutting = preferences(rows, tmp_path, seq_length=50, prompt_overflow="truncate_left")
    prompt, chosen, _ = rows_of(cutting.next_batch(0))[0]
    assert len(prompt) + len(chosen) == 50
    assert chat_tokenizer().decode(prompt) == "<s>" + "b" * 18
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the prompt has 41 tokens, more than what .*seq_length=50"):
        preferences(rows, tmp_path, seq_length=50, prompt_overflow="error")


def test_a_long_prompt_is_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 80, "chosen": "x", "rejected": "y"}]
    with pytest.raises(DataError, match=r"all 1 rows are dropped: .*max_prompt_length=64"):
        preferences(rows, tmp_path).next_batch(0)


def test_steps_cover_the_file_in_order_and_epochs_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "x", "rejected": "y"} for i in range(4)]
    file = preferences(rows, tmp_path)
    first, second = file.next_batch(0), file.next_batch(1)
    assert rows_of(first) == rows_of(second)
    assert [file.epoch(0), file.epoch(1)] == [1.0, 2.0]
    assert len(file) == 4


def test_strings_need_a_tokenizer_with_an_eos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos_token"):
        preferences(STRINGS, tmp_path, tokenizer)


def trl_reward_rows(rows: list[Row], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """What TRL's reward trainer makes of the same rows."""
    from trl import RewardConfig, RewardTrainer

    trainer = object.__new__(RewardTrainer)
    args = RewardConfig(output_dir="unused", max_length=None, bf16=False, report_to=[])
    prepared = trainer._prepare_dataset(datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return [(row["chosen_ids"], row["rejected_ids"]) for row in prepared]


@pytest.mark.parametrize("rows", [STRINGS, CHATS, IMPLICIT, IMPLICIT_STRINGS, MERGED])
def test_a_reward_model_sees_the_tokens_of_trls(rows: list[Row], tmp_path: Path) -> None:
    tokenizer = merging_tokenizer() if rows is MERGED else chat_tokenizer()
    pairs = preferences(rows, tmp_path, tokenizer, stage="rm").next_batch(0)
    ours = list(zip(pairs.chosen.rows(), pairs.rejected.rows(), strict=True))
    assert ours == [pair for row in rows for pair in trl_reward_rows([row], tokenizer)]


def test_a_reward_model_gets_margins(tmp_path: Path) -> None:
    rows = [row | {"by": margin} for row, margin in zip(STRINGS, [0.5, "-2", 0], strict=True)]
    pairs = preferences(rows, tmp_path, stage="rm", margin_key="by").next_batch(0)
    assert isinstance(pairs, RewardPairs)
    assert pairs.margin.tolist() == [0.5, -2.0, 0.0]
    without = preferences(rows, tmp_path, stage="rm").next_batch(0)
    assert isinstance(without, RewardPairs)
    assert without.margin.tolist() == [0.0, 0.0, 0.0]


def test_margins_stay_beside_their_pairs_when_rows_are_shuffled(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "x", "rejected": "y", "margin": i} for i in range(8)]
    pairs = preferences(rows, tmp_path, stage="rm", margin_key="margin", no_shuffle=False).next_batch(3)
    assert isinstance(pairs, RewardPairs)
    prompts = [chat_tokenizer().decode(ids, skip_special_tokens=True) for ids in pairs.chosen.prompt_rows()]
    assert [float(prompt) for prompt in prompts] == pairs.margin.tolist()


@pytest.mark.parametrize("margin", [None, "much", True, float("nan"), float("inf"), 1e39, 10**400, [1]])
def test_a_margin_that_is_no_number_is_named(margin: Any, tmp_path: Path) -> None:
    rows = [STRINGS[0] | {"margin": 1}, STRINGS[1] | {"margin": margin}]
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: field 'margin' .*expected a finite number"):
        preferences(rows, tmp_path, stage="rm", margin_key="margin")


def test_a_missing_margin_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad", "strength": 1}] * 2
    with pytest.raises(
        DataError, match=r"'margin' .* is missing; the row has: 'prompt', 'chosen', 'rejected', 'strength'"
    ):
        preferences(rows, tmp_path, stage="rm", margin_key="margin")
    assert len(preferences(rows, tmp_path, stage="dpo", margin_key="margin").next_batch(0)) > 0  # it reads none
