"""What the preprocessing writes for each handler and flag."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

import rlxf.tools.preprocess as preprocessing
from rlxf.assembly.data import open_examples, open_preferences, open_prompts
from rlxf.data.indexed import IndexedRows
from rlxf.data.templates import chat_template
from tests.data_world import chat_tokenizer, recipe
from tests.preprocess_world import (
    LLAMA3_ANSWER,
    LLAMA3_SYSTEM,
    LLAMA3_USER,
    ORCA,
    World,
    text,
    texts,
)

ROOT = Path(__file__).resolve().parents[3]
ORCA_KEYS = json.dumps({"prompt": "question", "query": "", "system": "system"})
PAIR_KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
ALPACA: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"], ["Well?", "Well."]]},
    {"instruction": "Sing.", "input": "", "output": "La", "history": []},
]
SHAREGPT: list[dict[str, Any]] = [
    {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q1"},
            {"from": "gpt", "value": "A1"},
            {"from": "human", "value": "Q2"},
        ],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
]


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    return World(tmp_path, capsys)


def command(folder: Path, *words: str) -> None:
    """The script as a user runs it, in a folder of its own."""
    words = (sys.executable, str(ROOT / "scripts" / "preprocess_data.py"), *words)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_for_online_dpo_runs_as_printed(world: World) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": "good", "rejected": "bad"} for i in range(5)]
    (world.folder / "dataset" / "llama3-hf").mkdir(parents=True)
    file = world.folder / "dataset" / "descriptiveness-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    command(
        world.folder,
        *("--input", "./dataset/descriptiveness-00000-of-00001.parquet"),
        *("--tokenizer-name-or-path", "./tokenizer/"),
        *("--output-prefix", "./dataset/llama3-hf/descriptiveness"),
        *("--workers", "16"),
        *("--log-interval", "1000"),
        *("--tokenizer-type", "PretrainedFromHF"),
        *("--handler-name", "PPOAlpacaStyleInstructionHandler"),
        *("--prompt-type", "llama3"),
        *("--map-keys", '{"prompt":"prompt", "query":"", "response": "prompt", "system":""}'),
    )
    made = IndexedRows(world.folder / "dataset" / "llama3-hf" / "descriptiveness")
    assert made.columns == ("attention_mask", "input_ids")
    assert [text(made[i]["input_ids"]) for i in range(5)] == [
        f"<s>{LLAMA3_USER}Question {i}?<|eot_id|>{LLAMA3_ANSWER}" for i in range(5)
    ]
    assert all(made[i]["attention_mask"] == [1] * len(made[i]["input_ids"]) for i in range(5))


def test_the_command_for_offline_dpo_runs_as_printed(world: World) -> None:
    world.write(ORCA, "orca_rlhf.jsonl")
    command(
        world.folder,
        *("--input", "./orca_rlhf.jsonl"),
        *("--tokenizer-type", "PretrainedFromHF"),
        "--tokenizer-not-use-fast",
        *("--tokenizer-name-or-path", "./tokenizer/"),
        *("--output-prefix", "./pair_dataset/orca_rlhf_llama3"),
        *("--workers", "4"),
        *("--log-interval", "1000"),
        *("--handler-name", "AlpacaStylePairwiseHandler"),
        *("--prompt-type", "llama3"),
        *("--map-keys", '{"prompt":"question", "query":"", "system":"system"}'),
    )
    prefix = world.folder / "pair_dataset" / "orca_rlhf_llama3"
    assert sorted(os.listdir(prefix.parent)) == sorted(
        f"orca_rlhf_llama3_packed_{key}_document.{suffix}" for key in PAIR_KEYS for suffix in ("bin", "idx")
    )
    read = {key: IndexedDataset(f"{prefix}_packed_{key}_document") for key in PAIR_KEYS}
    prompts = [
        f"<s>{LLAMA3_USER}What is 1+1?<|eot_id|>{LLAMA3_ANSWER}",
        f"<s>{LLAMA3_SYSTEM}Be brief.<|eot_id|>{LLAMA3_USER}Name a colour.<|eot_id|>{LLAMA3_ANSWER}",
        f"<s>{LLAMA3_USER}Say hello.<|eot_id|>{LLAMA3_ANSWER}",
    ]
    for side in ("chosen", "rejected"):
        for row, (ids, labels) in enumerate(zip(read[f"{side}_input_ids"], read[f"{side}_labels"], strict=True)):
            assert ids.dtype == labels.dtype == np.int32
            assert text(ids) == f"{prompts[row]}{ORCA[row][side]}<|eot_id|>"
            assert text(labels) == f"{ORCA[row][side]}<|eot_id|>"
            assert (labels[: len(prompts[row]) - len("<s>") + 1] == -100).all()  # <s> is one token, others one a byte


def test_an_example_counts_every_answer(world: World) -> None:
    world.write(ALPACA)
    assert world.run(handler="AlpacaStyleInstructionHandler", prompt_type="qwen") == 0
    first, second = world.made()
    assert text(first["labels"]) == "Hello<|im_end|>Well.<|im_end|>3<|im_end|>"
    assert "<|im_start|>user\nAdd.\n1 2<|im_end|>" in text(first["input_ids"])
    assert text(second["labels"]) == "La<|im_end|>"
    for row in (first, second):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_prompts_keep_the_turns_before_the_question(world: World) -> None:
    world.write(ALPACA)
    assert world.run(handler="PPOAlpacaStyleInstructionHandler", prompt_type="empty") == 0
    assert texts(world.made(), "input_ids") == ["HiHelloWell?Well.Add.\n1 2", "Sing."]


def test_sharegpt_rows_become_pairs(world: World) -> None:
    world.write(SHAREGPT)
    assert world.run(handler="SharegptStylePairwiseHandler", prompt_type="deepseek3") == 0
    (row,) = world.made()
    assert text(row["chosen_input_ids"]) == "<s>S<｜User｜>Q1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>yes</s>"
    assert [text(row[key]) for key in ("chosen_labels", "rejected_labels")] == ["yes</s>", "no</s>"]


def test_other_names_of_speakers_are_given_as_tags(world: World) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"}
    world.write([{"talk": [{"role": "user", "content": "Q"}, {"role": "bot", "content": "A"}]}])
    keys = json.dumps({"messages": "talk", "tags": tags})
    assert world.run(handler="SharegptStyleInstructionHandler", prompt_type="deepseek3", map_keys=keys) == 0
    assert texts(world.made(), "labels") == ["A</s>"]


def test_pairs_may_be_lists_of_both_answers(world: World) -> None:
    world.write([{"instruction": "Q", "output": ["good", "bad"]}])
    keys = json.dumps({"chosen": "output", "rejected": "output"})
    assert world.run(handler="AlpacaStylePairwiseHandler", prompt_type="empty", map_keys=keys) == 0
    (row,) = world.made()
    assert (text(row["chosen_input_ids"]), text(row["rejected_input_ids"])) == ("Qgood", "Qbad")


def test_without_a_prompt_type_the_tokenizers_own_template_writes(world: World) -> None:
    world.write(ALPACA[1:])
    assert world.run(handler="AlpacaStyleInstructionHandler") == 0
    (row,) = world.made()
    assert text(row["input_ids"]) == "<s>[user]Sing.</s>[assistant]La</s>"
    assert text(row["labels"]) == "La</s>"


def test_whole_texts_are_written_for_pretraining(world: World) -> None:
    world.write([{"text": "abc"}, {"text": "de"}])
    assert world.run("--append-eod") == 0
    read = IndexedDataset(f"{world.prefix}_text_document")
    assert [text(row) for row in read] == ["<s>abc</s>", "<s>de</s>"]


def test_append_eod_ends_a_row_once(world: World) -> None:
    world.write(ALPACA[1:])
    for prompt_type, whole in (("empty", "Sing.La</s>"), ("deepseek2", "<s>User: Sing.\n\nAssistant:La</s>")):
        assert world.run("--append-eod", handler="AlpacaStyleInstructionHandler", prompt_type=prompt_type) == 0
        (row,) = world.made()
        assert text(row["input_ids"]) == whole
        assert text(row["labels"]) == "La</s>"


def test_other_columns_are_written_as_keys_of_their_own(world: World) -> None:
    world.write([{"instruction": "1+1?", "output": "2", "kind": "sum"}])
    flags = ("--dataset-additional-keys", "labels", "kind")
    assert world.run(*flags, handler="R1AlpacaStyleInstructionHandler", prompt_type="trl") == 0
    (row,) = world.made()
    assert {key: text(ids) for key, ids in row.items() if key != "attention_mask"} == {
        "input_ids": "<s>1+1?",
        "labels": "2",
        "kind": "sum",
    }


def test_the_files_are_the_same_for_any_number_of_workers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "CHUNK_ROWS", 3)
    world.write([{"instruction": f"Question {i}" * (i % 5 + 1), "output": f"A{i}"} for i in range(40)])
    written = []
    for workers in ("1", "3"):
        assert world.run(handler="AlpacaStyleInstructionHandler", prompt_type="llama3", workers=workers) == 0
        written.append(world.outputs())
    assert written[0] == written[1]
    assert texts(world.made(), "labels") == [f"A{i}<|eot_id|>" for i in range(40)]


def test_longer_rows_are_left_out_and_counted(world: World) -> None:
    world.write([{"instruction": "x" * n, "output": "y"} for n in (3, 9, 10, 4)])
    assert world.run(handler="AlpacaStyleInstructionHandler", prompt_type="empty", seq_length="10") == 0
    assert texts(world.made(), "input_ids") == ["xxxy", "x" * 9 + "y", "xxxxy"]
    assert "left out: 1 rows because it is longer than --seq-length 10" in world.said


def test_pairs_of_equal_answers_are_left_out(world: World) -> None:
    world.write([{"instruction": "Q", "chosen": "a", "rejected": answer} for answer in "ab"])
    assert world.run(handler="AlpacaStylePairwiseHandler", prompt_type="empty") == 0
    assert len(world.made()) == 1
    assert "left out: 1 rows because chosen and rejected are the same tokens" in world.said


def test_packed_rows_are_full_sequences(world: World) -> None:
    world.write([{"instruction": q, "output": a} for q, a in (("ab", "c"), ("d", "e"), ("fgh", "i"))])
    handler = "AlpacaStyleInstructionHandler"
    assert world.run("--pack", "--neat-pack", handler=handler, prompt_type="empty", seq_length="6") == 0
    pad = chat_tokenizer().pad_token_id
    first, second = world.made()
    assert text(first["input_ids"][:5]) == "abcde"
    assert first["input_ids"][5:] == [pad]
    assert first["attention_mask"] == [1, 1, 1, 2, 2, 0]
    assert [label == -100 for label in first["labels"]] == [True, True, False, True, False, True]
    assert second["attention_mask"] == [1, 1, 1, 1, 0, 0]
    assert world.run("--pack", handler=handler, prompt_type="empty", seq_length="6") == 0
    assert world.made()[0]["attention_mask"] == [1, 1, 1, 1, 1, 0]


def test_only_the_first_rows_are_taken(world: World) -> None:
    world.write([{"text": letter} for letter in "abcd"])
    assert world.run(max_samples="2") == 0
    assert len(IndexedDataset(f"{world.prefix}_text_document")) == 2


def test_bad_rows_are_named_and_left_out(world: World) -> None:
    lines = [b'{"text": "a"}', b"{oops", b'{"text": null}', b'{"text": "\xff"}', b'{"text": "b"}', b'{"text": " "}']
    file = world.write(b"\n".join(lines))
    assert world.run(max_bad_rows="4") == 0
    assert len(IndexedDataset(f"{world.prefix}_text_document")) == 2
    for place, reason in (("2", "not JSON"), ("3", "expected a string, got null"), ("4", "not UTF-8"), ("6", "empty")):
        assert any(f"left out: {file}:{place}: " in line and reason in line for line in world.said.splitlines())
    assert "left out 4, of which 4 were bad" in world.said


def test_one_row_in_a_hundred_may_be_bad(world: World) -> None:
    rows: list[Any] = [{"text": "a"}] * 199
    world.write([*rows, {"text": ""}])
    assert world.run() == 0
    world.write([*rows[2:], *[{"text": ""}] * 3])
    before = world.outputs()
    assert world.run() == 2
    assert "field 'text' is empty" in world.said
    assert "--max-bad-rows" in world.said
    assert world.outputs() == before


@pytest.mark.parametrize("handler", ["PPOAlpacaStyleInstructionHandler", "AlpacaStylePairwiseHandler"])
def test_a_row_that_the_template_refuses_is_one_bad_row(handler: str, world: World) -> None:
    odd = [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    world.write([{"instruction": q, "chosen": "a", "rejected": "b"} for q in ("Q", odd, "R")])
    assert world.run(handler=handler, prompt_type="llama3", max_bad_rows="1") == 0
    assert len(world.made()) == 2
    assert "llama3 has no place for role system here" in world.said


def test_a_dead_worker_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "CHUNK_ROWS", 1)
    monkeypatch.setattr(preprocessing, "_encode", lambda *_: os._exit(9))
    world.write([{"text": "a"}, {"text": "b"}])
    assert world.run(workers="2") == 1
    assert "a worker process of the preprocessing died" in world.said
    assert world.outputs() == {}


def test_a_worker_that_does_not_answer_is_ended_and_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "CHUNK_ROWS", 1)
    monkeypatch.setattr(preprocessing, "LIMIT_S", 0.5)
    monkeypatch.setattr(preprocessing, "_encode", lambda *_: time.sleep(600))
    world.write([{"text": "a"}, {"text": "b"}])
    begin = time.monotonic()
    assert world.run(workers="2") == 1
    assert time.monotonic() - begin < 60
    assert "not tokenized within 0.5 s by one of --workers 2" in world.said
    assert world.outputs() == {}
    assert not multiprocessing.active_children()


def test_files_of_a_group_are_joined(world: World) -> None:
    for name, letters in (("a", "xy"), ("b", "z")):
        world.write([{"text": letter} for letter in letters])
        assert world.run(output_prefix=str(world.folder / "parts" / name)) == 0
    assert world.run("--merge-group-keys", "text_document", input=str(world.folder / "parts")) == 0
    assert [text(row) for row in IndexedDataset(f"{world.prefix}_text_document")] == ["<s>x", "<s>y", "<s>z"]


def test_a_data_set_of_the_hub_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.append((name, options))
        return datasets.Dataset.from_list([{"text": letter} for letter in "abc"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert world.run("--streaming", input="some-one/letters", max_samples="2", cache_dir="cache") == 0
    assert asked == [("some-one/letters", {"split": "train", "cache_dir": "cache", "streaming": True})]
    assert len(IndexedDataset(f"{world.prefix}_text_document")) == 2


def test_the_tokens_are_those_of_training_from_the_file_itself(world: World) -> None:
    file = world.write([row | {"instruction": row["question"], "output": row["chosen"]} for row in ORCA])
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = chat_template("qwen").jinja
    actor = {"data_path": str(file), "data_format": "alpaca", "no_shuffle": True, "seq_length": 512}
    config = recipe(
        training={"stage": "ray_online_dpo", "global_batch_size": len(ORCA), "train_iters": 1},
        actor_rollout={**actor, "model": "tiny", "max_prompt_length": 512, "prompt_overflow": "error"},
    )
    assert world.run(handler="PPOAlpacaStyleInstructionHandler", prompt_type="qwen") == 0
    assert [row["input_ids"] for row in world.made()] == open_prompts(config, tokenizer).next_batch(0).prompts.rows()

    pairs = open_preferences(config, tokenizer).next_batch(0)
    world.prefix = world.folder / "out" / "pairs"
    assert world.run(handler="AlpacaStylePairwiseHandler", prompt_type="qwen") == 0
    for side, sequences in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        assert [row[f"{side}_input_ids"] for row in world.made()] == sequences.rows()
        labels = [[i for i in row[f"{side}_labels"] if i != -100] for row in world.made()]
        assert labels == sequences.completion_rows()

    examples = open_examples(config, tokenizer).next_batch(0)
    world.prefix = world.folder / "out" / "examples"
    assert world.run(handler="AlpacaStyleInstructionHandler", prompt_type="qwen") == 0
    assert [row["input_ids"] for row in world.made()] == examples.sequences.rows()
    assert [label for row in world.made() for label in row["labels"] if label != -100] == [
        token
        for token, counts in zip(
            [t for row in examples.sequences.completion_rows() for t in row], examples.counted.tolist(), strict=True
        )
        if counts
    ]
