"""Wrong input of the preprocessing: one clear line for each mistake, and nothing is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.data_world import chat_tokenizer
from tests.preprocess_world import ORCA, World

PAIR, PPO = "AlpacaStylePairwiseHandler", "PPOAlpacaStyleInstructionHandler"
SFT, SHARE = "AlpacaStyleInstructionHandler", "SharegptStyleInstructionHandler"
KEYS = json.dumps({"prompt": "question"})


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    made = World(tmp_path, capsys)
    made.write([row | {"text": "long"} for row in ORCA])
    return made


def refused(world: World, *reasons: str) -> None:
    """It ended with one message, which says all of these, and left nothing."""
    message = [line for line in world.said.splitlines() if "error: " in line]
    assert len(message) == 1, world.said
    for reason in reasons:
        assert reason in world.said
    assert "Traceback" not in world.said
    assert not world.prefix.parent.exists() or os.listdir(world.prefix.parent) == []


FLAGS: list[tuple[list[str], dict[str, str | None], list[str]]] = [
    ([], {"handler": "AlpacaStylePairHandler"}, ["is not a handler", f'Did you mean "{PAIR}"?', "Known: General"]),
    ([], {"handler": PPO, "prompt_type": "lama3"}, ['"lama3" is not the name', 'Did you mean "llama3"?', "Known: "]),
    ([], {"handler": PPO, "map_keys": "{prompt: question}"}, ["--map-keys: expected a JSON object", "at column 2"]),
    ([], {"handler": PPO, "map_keys": '["question"]'}, ["--map-keys: expected a JSON object, got"]),
    ([], {"handler": PPO, "map_keys": '{"promt": "question"}'}, ['"promt" is not a key', 'Did you mean "prompt"?']),
    ([], {"handler": PPO, "map_keys": '{"prompt": 3}'}, ["prompt must be a column name or an empty string, got 3"]),
    ([], {"handler": PPO, "map_keys": '{"prompt": "qestion"}'}, ['no row has a column "qestion"', '"question"']),
    (
        [],
        {"handler": PAIR, "map_keys": '{"prompt": "question", "query": "context"}'},
        ['no row has a column "context"'],
    ),
    ([], {"handler": PPO}, ['no row has a column "instruction"', "system, question, chosen, rejected", "--map-keys"]),
    ([], {"handler": SFT, "map_keys": KEYS}, ['no row has a column "output"']),
    ([], {"handler": SHARE}, ['no row has a column "conversations"']),
    ([], {"handler": SHARE, "map_keys": '{"tags": {"rol_tag": "role"}}'}, ['"rol_tag" is not a tag; known: role_tag']),
    ([], {"handler": SHARE, "map_keys": '{"tags": "role"}'}, ["tags must be an object of texts, got 'role'"]),
    ([], {"json_keys": "txt"}, ['no row has a column "txt" (--json-keys)', 'Did you mean "text"?']),
    ([], {"map_keys": '{"prompt": "text"}'}, ["this handler has none; use --json-keys"]),
    ([], {"prompt_type": "qwen"}, ["--prompt-type writes conversations", "leave it out"]),
    (["--dataset-additional-keys", "kind"], {"handler": PPO, "map_keys": KEYS}, ['"kind" (--dataset-additional-keys)']),
    (["--dataset-additional-keys", "input_ids"], {"handler": PPO}, ["input_ids is a key that PPOAlpaca"]),
    (["--dataset-additional-keys", "text"], {}, ["takes its columns from --json-keys"]),
    (["--pack"], {"handler": SFT}, ["--pack fills rows of --seq-length tokens"]),
    (["--pack"], {"handler": PAIR, "seq_length": "8"}, ["--pack joins examples", "pairs, which are never joined"]),
    (["--pack"], {"seq_length": "8"}, ["--pack joins examples", "whole texts, which are never joined"]),
    (
        ["--neat-pack"],
        {"handler": SFT},
        ["--neat-pack needs --pack; add --pack"],
    ),
    ([], {"workers": "0"}, ["--workers: expected a whole number, at least 1, got '0'"]),
    ([], {"workers": "two"}, ["--workers: expected a whole number, at least 1, got 'two'"]),
    ([], {"seq_length": "1"}, ["--seq-length: expected a whole number, at least 2, got '1'"]),
    ([], {"max_bad_rows": "-1"}, ["--max-bad-rows: expected a whole number, at least 0, got '-1'"]),
    (["--promt-type", "qwen"], {}, ["--promt-type is not a flag. Did you mean --prompt-type?"]),
    ([], {"tokenizer_type": "GPT2BPETokenizer"}, ["--tokenizer-type GPT2BPETokenizer: only PretrainedFromHF"]),
    ([], {"interleave_probs": "0.1,0.9"}, ["mix them in training", "actor_rollout.data_weights"]),
    ([], {"mix_strategy": "interleave_over"}, ["sources are not mixed here"]),
    ([], {"tokenizer_name_or_path": None}, ["--tokenizer-name-or-path is missing"]),
    ([], {"tokenizer_name_or_path": "./nowhere"}, ["nowhere: no such folder"]),
    ([], {"input": None}, ["required: --input"]),
    ([], {"input": "./nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
    ([], {"seq_length": "2"}, ["no row is left of 3", "3 rows: it is longer than --seq-length 2"]),
    (["--streaming"], {"input": "some-one/letters"}, ["say how many with --max-samples"]),
    (["--merge-group-keys", "text"], {"input": "./nowhere"}, ["nowhere: no such folder; --merge-group-keys"]),
]


@pytest.mark.parametrize(("flags", "changed", "reasons"), FLAGS)
def test_wrong_flags(flags: list[str], changed: dict[str, str | None], reasons: list[str], world: World) -> None:
    assert world.run(*flags, **changed) == 2
    refused(world, *reasons)


def _mixed(world: World) -> Path:
    folder = world.folder / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "b.csv").write_text("text\nb\n")
    return folder


def _empty_folder(world: World) -> Path:
    (world.folder / "empty").mkdir()
    return world.folder / "empty"


INPUTS: list[tuple[Callable[[World], Path], str]] = [
    (lambda world: world.write(b"", "empty.jsonl"), "holds no rows"),
    (lambda world: world.write(b"text\n", "empty.csv"), "holds no rows"),
    (lambda world: world.write(b"PAR1 no", "broken.parquet"), "Parquet"),
    (lambda world: world.write(b"{oops\n" * 3, "broken.jsonl"), "not JSON"),
    (lambda world: world.write(b"abc", "notes.docx"), "cannot read .docx"),
    (_mixed, "several kinds"),
    (_empty_folder, "folder without data files"),
]


@pytest.mark.parametrize(("make", "reason"), INPUTS)
def test_input_that_cannot_be_read(make: Callable[[World], Path], reason: str, world: World) -> None:
    assert world.run(input=str(make(world))) == 2
    refused(world, reason)


def test_output_where_nothing_can_be_written(world: World) -> None:
    assert world.run(output_prefix=str(world.folder / "data.jsonl" / "x")) == 2
    refused(world, "data.jsonl: cannot be written to")


def test_a_tokenizer_without_a_template(world: World) -> None:
    plain = chat_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(world.folder / "plain")
    plain_folder = str(world.folder / "plain")
    assert world.run(handler=PPO, map_keys=KEYS, tokenizer_name_or_path=plain_folder) == 2
    refused(world, "has no chat template of its own; name one with --prompt-type")


def test_append_eod_without_an_eos(world: World) -> None:
    plain = chat_tokenizer()
    plain.eos_token = None
    plain.save_pretrained(world.folder / "plain")
    assert world.run("--append-eod", tokenizer_name_or_path=str(world.folder / "plain")) == 2
    refused(world, "--append-eod: the tokenizer", "has no eos_token")


def test_a_data_set_of_the_hub_that_cannot_be_had(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: object) -> None:
        raise ConnectionError("no\n network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert world.run(input="some-one/letters") == 2
    refused(world, "some-one/letters: no such file or folder", "Hub that can be read: no network")


def test_a_data_set_of_the_hub_without_the_package_that_reads_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert world.run(input="some-one/letters") == 2
    refused(world, "some-one/letters: no such file or folder", "pip install 'rlxf[hub]'")


def test_no_file_of_a_group(world: World) -> None:
    assert world.run(input=str(world.write([{"text": "a"}]))) == 0
    parts = world.prefix.parent
    world.prefix = world.folder / "joined" / "data"
    assert world.run("--merge-group-keys", "labels", input=str(parts)) == 2
    refused(world, "no indexed file with 'labels' in its name; it holds data_text_document")
