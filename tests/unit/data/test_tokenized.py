"""Training on preprocessed folders: the same batches as from the text, and rows that do not fit the stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from rlxf.assembly.data import open_examples, open_preferences, open_prompts
from rlxf.config.folders import folder_problems
from rlxf.config.schema import RunConfig
from rlxf.core.data_files import data_files
from rlxf.core.errors import DataError
from rlxf.data.indexed import packed_name
from rlxf.data.templates import chat_template
from tests.data_world import chat_tokenizer, recipe
from tests.preprocess_world import ORCA, World

ROWS = [row | {"instruction": row["question"], "output": row["chosen"], "kind": f"k{i}"} for i, row in enumerate(ORCA)]
PAIR, PPO, SFT = "AlpacaStylePairwiseHandler", "PPOAlpacaStyleInstructionHandler", "AlpacaStyleInstructionHandler"


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    made = World(tmp_path, capsys)
    made.write(ROWS)
    return made


def config(path: Path | str, stage: str = "ray_online_dpo", **actor: Any) -> RunConfig:
    return recipe(
        training={"stage": stage, "global_batch_size": 2, "train_iters": 1},
        actor_rollout={"model": "tiny", "data_path": str(path), "seq_length": 512, "max_prompt_length": 512, **actor},
    )


def write(prefix: Path, **keys: list[list[int]]) -> Path:
    """Indexed files as Megatron's own builder makes them."""
    for key, rows in keys.items():
        builder = IndexedDatasetBuilder(f"{packed_name(prefix, key)}.bin", dtype=np.int32)
        for row in rows:
            builder.add_document(np.array(row), [len(row)])
        builder.finalize(f"{packed_name(prefix, key)}.idx")
    return prefix


def template_tokenizer() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = chat_template("qwen").jinja
    return tokenizer


def same_sequences(left: Any, right: Any) -> bool:
    return bool(left.rows() == right.rows() and torch.equal(left.prompt_lengths, right.prompt_lengths))


def test_prompts_are_the_same_and_their_text_reaches_reward_functions(world: World) -> None:
    tokenizer = template_tokenizer()
    flags = ("--dataset-additional-keys", "kind")
    assert world.run(*flags, handler=PPO, prompt_type="qwen") == 0
    ours = open_prompts(config(world.prefix), tokenizer).next_batch(0)
    text = open_prompts(config(world.folder / "data.jsonl", data_format="alpaca"), tokenizer).next_batch(0)
    assert ours.prompts.rows() == text.prompts.rows()
    assert ours.row_ids.tolist() == text.row_ids.tolist()
    assert ours.columns == {"kind": text.columns["kind"]}
    assert ours.texts == tuple(tokenizer.decode(row) for row in text.prompts.rows())


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_pairs_are_the_same(stage: str, world: World) -> None:
    tokenizer = template_tokenizer()
    assert world.run(handler=PAIR, prompt_type="qwen") == 0
    ours = open_preferences(config(world.prefix.parent, stage), tokenizer).next_batch(0)
    text = open_preferences(config(world.folder / "data.jsonl", stage, data_format="alpaca"), tokenizer).next_batch(0)
    assert same_sequences(ours.chosen, text.chosen)
    assert same_sequences(ours.rejected, text.rejected)


def test_examples_are_the_same(world: World) -> None:
    tokenizer = template_tokenizer()
    turns = [["Hi", "Hello"]]
    world.write([row | {"history": turns} for row in ROWS])
    assert world.run(handler=SFT, prompt_type="qwen") == 0
    ours = open_examples(config(world.prefix, "sft"), tokenizer).next_batch(0)
    text = open_examples(config(world.folder / "data.jsonl", "sft", data_format="alpaca"), tokenizer).next_batch(0)
    assert same_sequences(ours.sequences, text.sequences)
    assert torch.equal(ours.counted, text.counted)
    assert not ours.counted.all()  # the second question is in the completion


def test_prompts_are_found_in_pairs_and_examples(world: World) -> None:
    tokenizer = template_tokenizer()
    assert world.run(handler=PPO, prompt_type="qwen") == 0
    prompts = open_prompts(config(world.prefix), tokenizer).next_batch(0).prompts.rows()
    for handler in (PAIR, SFT):
        world.prefix = world.folder / handler / "data"
        assert world.run(handler=handler, prompt_type="qwen") == 0
        assert open_prompts(config(world.prefix), tokenizer).next_batch(0).prompts.rows() == prompts


def test_padding_behind_an_example_is_left_out(world: World) -> None:
    assert world.run("--pack", handler=SFT, prompt_type="qwen", seq_length="400") == 0
    (row,) = world.made()
    examples = open_examples(config(world.prefix, "sft", seq_length=512), template_tokenizer()).next_batch(0)
    assert examples.sequences.rows()[0] == row["input_ids"][: sum(row["attention_mask"])]
    assert len(row["input_ids"]) == 400


def test_a_label_that_is_another_token_is_not_counted(tmp_path: Path) -> None:
    """MindSpeed-LLM writes EOS as the label of a later question's first token: no token of the sequence."""
    prefix = write(
        tmp_path / "glm",
        input_ids=[[5, 6, 7, 8, 9]] * 2,
        labels=[[-100, 6, 2, -100, 9]] * 2,
        attention_mask=[[1] * 5] * 2,
    )
    examples = open_examples(config(prefix, "sft"), chat_tokenizer()).next_batch(0)
    assert examples.sequences.prompt_lengths.tolist() == [1, 1]
    assert examples.counted.tolist() == [True, False, False, True] * 2


BAD: list[tuple[str, Callable[..., Any], dict[str, list[list[int]]], str]] = [
    (
        "dpo",
        open_preferences,
        {"input_ids": [[1, 2]]},
        "no tokens under 'chosen_input_ids'; the files have input_ids: anot",
    ),
    ("sft", open_examples, {"input_ids": [[1, 2]]}, "no tokens under 'labels'"),
    ("sft", open_examples, {"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "'labels' counts no token"),
    ("sft", open_examples, {"input_ids": [[1, 2]], "labels": [[1, 2]]}, "counts the first token, which none precedes"),
    ("sft", open_examples, {"input_ids": [[1, 2]], "labels": [[-100]]}, "2 tokens in 'input_ids', but 1 labels"),
    (
        "sft",
        open_examples,
        {"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "attention_mask": [[1, 1, 2]]},
        "several examples in one row, as --neat-pack writes them",
    ),
    (
        "dpo",
        open_preferences,
        {
            "chosen_input_ids": [[1, 2, 3]],
            "chosen_labels": [[-100, -100, 3]],
            "rejected_input_ids": [[1, 4, 5]],
            "rejected_labels": [[-100, -100, 5]],
        },
        "chosen and rejected begin with different prompts",
    ),
]


@pytest.mark.parametrize(("stage", "source", "keys", "reason"), BAD)
def test_rows_that_do_not_fit_the_stage_are_named(
    stage: str, source: Callable[..., Any], keys: dict[str, list[list[int]]], reason: str, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "data", **keys)
    with pytest.raises(DataError, match=f"{prefix}: row 1: .*{reason}"):
        source(config(prefix, stage), chat_tokenizer())


def test_a_recipe_may_name_a_prefix_or_its_folder(world: World) -> None:
    assert world.run(handler=PPO, prompt_type="qwen") == 0
    for path in (world.prefix, world.prefix.parent):
        assert [p for p in folder_problems(config(path)) if "data_path" in p.text] == []
        assert {file.name for file in data_files([str(path)])} == set(world.outputs())
    problems = [p.text for p in folder_problems(config(world.folder / "out" / "dat")) if "data_path" in p.text]
    assert len(problems) == 1
    assert "no such folder, and no files of that prefix" in problems[0]
