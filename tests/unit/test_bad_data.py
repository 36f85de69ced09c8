"""Files that cannot be used: each is refused with its name, the line and the reason, before anything else happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlxf.assembly.data import open_preferences, open_prompts, open_replay
from rlxf.core.errors import DataError
from tests.data_world import chat_tokenizer, recipe

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "hi"}
GOOD_PROMPT = {"prompt": "fine"}
GOOD_PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
GOOD_ROLLOUT: dict[str, Any] = {
    "prompt_ids": [1, 5],
    "completions": [{"token_ids": [6, 2], "score": 0.5}, {"token_ids": [7], "score": None}],
    "policy_version": 0,
}


def open_prompt_file(path: Path) -> None:
    open_prompts(recipe(actor_rollout={"model": "tiny", "data_path": str(path)}), chat_tokenizer())


def open_pairs(path: Path) -> None:
    open_preferences(recipe(actor_rollout={"model": "tiny", "data_path": str(path)}), chat_tokenizer())


def open_rollouts(path: Path) -> None:
    config = recipe(actor_rollout={"model": "tiny", "seq_length": 16}, rollout={"replay_path": str(path)})
    open_replay(config, chat_tokenizer())


def refused(opener: Callable[[Path], None], path: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as raised:
        opener(path)
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


def with_row(**changes: Any) -> bytes:
    return json.dumps(GOOD_ROLLOUT | changes).encode()


def with_completion(completion: Any) -> bytes:
    return with_row(completions=[GOOD_ROLLOUT["completions"][0], completion])


BAD_PROMPTS = {
    "broken JSON": (b'{"prompt": "x"', "not JSON: Expecting ',' delimiter at column 15"),
    "two objects on a line": (b'{"prompt": "x"} {"prompt": "y"}', "not JSON: Extra data at column 17"),
    "no JSON": (b"hello", "not JSON: Expecting value at column 1"),
    "endless nesting": (b"[" * 99_999, "not JSON that can be read: "),
    "bad UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 16; save the file as UTF-8"),
    "list": (b'["x"]', "expected a JSON object, got a list (['x'])"),
    "string": (b'"x"', "expected a JSON object, got a string ('x')"),
    "missing field": (b'{"text": "x", "n": 1}', "field 'prompt' is missing; the row has: 'text', 'n'"),
    "no field": (b"{}", "field 'prompt' is missing; the row has: none"),
    "null": (b'{"prompt": null}', "expected a string or a list of chat messages, got null"),
    "empty": (b'{"prompt": ""}', "field 'prompt' is empty"),
    "blank": (b'{"prompt": " \\n"}', "field 'prompt' is empty"),
    "number": (b'{"prompt": 5}', "expected a string or a list of chat messages, got a number (5)"),
    "object": (b'{"prompt": {"role": "user"}}', "got an object"),
    "lone surrogate": (b'{"prompt": "x\\ud800y"}', "field 'prompt' holds a lone surrogate (\\ud800)"),
    "no messages": (b'{"prompt": []}', "field 'prompt' is an empty list"),
    "message of another kind": (b'{"prompt": ["hi"]}', "message 1: expected an object with 'role' and 'content'"),
    "message without role": (b'{"prompt": [{"content": "x"}]}', "message 1: 'role' is missing"),
    "message without content": (b'{"prompt": [{"role": "user"}]}', "message 1: 'content' is missing"),
    "content of parts": (
        b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}',
        "message 1: 'content' must be a string, got a list",
    ),
    "empty message": (b'{"prompt": [{"role": "user", "content": ""}]}', "message 1 is empty"),
    "surrogate in a message": (b'{"prompt": [{"role": "user", "content": "\\udfff"}]}', "lone surrogate (\\udfff)"),
    "nothing to answer": (json.dumps({"prompt": [USER, SYSTEM]}).encode(), "the last message has role 'system'"),
    "line of 5 MiB": (b'{"prompt": "' + b"x" * 5 * 2**20 + b'"}', "the line is longer than 4 MiB"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_is_named_by_line(line: bytes, reason: str, tmp_path: Path) -> None:
    good = json.dumps(GOOD_PROMPT).encode()
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]))
    (problem,) = refused(open_prompt_file, path)
    assert problem.startswith(f"{path}:3: ")
    assert reason in problem


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "no chosen": ({"prompt": "p", "rejected": "r"}, "field 'chosen' is missing"),
    "no rejected": ({"prompt": "p", "chosen": "c"}, "field 'rejected' is missing"),
    "no prompt": ({"chosen": "c", "rejected": "r"}, "field 'prompt' is missing; the row has: 'chosen', 'rejected'"),
    "null": ({"prompt": "p", "chosen": None, "rejected": "r"}, "field 'chosen': expected a string or a list"),
    "empty": ({"prompt": "p", "chosen": "c", "rejected": ""}, "field 'rejected' is empty"),
    "mixed kinds": (
        {"prompt": "p", "chosen": [USER], "rejected": [USER]},
        "prompt is a string, chosen is chat messages, rejected is chat messages",
    ),
    "prompt repeated": (
        {"prompt": [USER], "chosen": [USER, USER], "rejected": [SYSTEM]},
        "the chosen messages repeat the prompt",
    ),
    "nothing in common": ({"chosen": [USER], "rejected": [SYSTEM]}, "no common prompt"),
    "nothing but the prompt": ({"chosen": [USER], "rejected": [USER, USER]}, "the chosen conversation holds nothing"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_bad_pair_is_named_by_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (GOOD_PAIR, row, GOOD_PAIR)))
    (problem,) = refused(open_pairs, path)
    assert problem.startswith(f"{path}:2: ")
    assert reason in problem


BAD_ROLLOUTS = {
    "prompt missing": (b'{"completions": [], "policy_version": 0}', "'prompt_ids' missing"),
    "version missing": (b'{"completions": [], "prompt_ids": [1]}', "'policy_version' missing"),
    "version negative": (with_row(policy_version=-1), "policy_version: expected a number of updates"),
    "empty prompt": (with_row(prompt_ids=[]), "prompt_ids: expected a list of token ids, not empty; got a list ([])"),
    "text for ids": (with_row(prompt_ids="hi"), "prompt_ids: expected a list of token ids, not empty; got a string"),
    "negative id": (with_row(prompt_ids=[3, -1]), "prompt_ids: expected token ids from 0 to 258, got a number (-1)"),
    "id outside": (with_row(prompt_ids=[3, 259]), "expected token ids from 0 to 258, got a number (259)"),
    "fraction": (with_row(prompt_ids=[3, 4.0]), "expected token ids from 0 to 258, got a number (4.0)"),
    "truth value": (with_row(prompt_ids=[True, 4]), "expected token ids from 0 to 258, got a boolean (True)"),
    "one completion": (with_row(completions=GOOD_ROLLOUT["completions"][:1]), "expected a list of at least 2, got 1"),
    "completions of another kind": (with_row(completions={"a": 1}), "expected a list of at least 2, got an object"),
    "completion of another kind": (with_completion([5, 6]), "completion 1: expected an object with token_ids"),
    "empty completion": (with_completion({"token_ids": []}), "completion 1: token_ids: expected a list of token ids"),
    "score of another kind": (with_completion({"token_ids": [5], "score": "1"}), "score: expected a number or null"),
    "NaN": (with_completion({"token_ids": [5], "score": float("nan")}), "write null for no score"),
    "infinite score": (with_completion({"token_ids": [5], "score": 1e39}), "is not a finite float32"),
    "too long": (with_completion({"token_ids": [5] * 15}), "are 17 tokens, more than actor_rollout.seq_length=16"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROLLOUTS.values(), ids=BAD_ROLLOUTS.keys())
def test_a_bad_recording_is_named_by_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(with_row() + b"\n" + line + b"\n" + with_row() * 1)
    (problem,) = refused(open_rollouts, path)
    assert problem.startswith(f"{path}:2: ")
    assert reason in problem


def write_empty(path: Path) -> Path:
    path.write_text("\n\n")
    return path


def write_list(path: Path) -> Path:
    path.with_suffix(".jsonl").write_text(json.dumps([GOOD_PROMPT] * 3, indent=1))
    return path.with_suffix(".jsonl")


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def write_text(path: Path) -> Path:
    path.with_suffix(".txt").write_text("prompt\nhi\n")
    return path.with_suffix(".txt")


def write_damaged_parquet(path: Path) -> Path:
    path.with_suffix(".parquet").write_bytes(b"PAR1 this is none")
    return path.with_suffix(".parquet")


BAD_WHOLE_FILES = {
    "absent": (lambda path: path, "no such file"),
    "folder": (
        make_folder,
        "is a folder without data files; expected files that end in .jsonl, .json, .csv, .parquet, .arrow",
    ),
    "other suffix": (write_text, "cannot read .txt; known: .jsonl, .json, .csv, .parquet, .arrow"),
    "no rows": (write_empty, "holds no rows"),
    "one JSON list": (write_list, "the file is one JSON list; write one object per line"),
    "damaged parquet": (write_damaged_parquet, "not a Parquet file that can be read"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_WHOLE_FILES.values(), ids=BAD_WHOLE_FILES.keys())
def test_a_file_of_the_wrong_kind_is_refused(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = make(tmp_path / "prompts.json")
    (problem,) = refused(open_prompt_file, path)
    assert problem.startswith(f"{path}:")
    assert reason in problem


def test_parquet_rows_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["fine", None, "", "fine"]}), path, row_group_size=2)
    assert [problem.split(",")[0] for problem in refused(open_prompt_file, path)] == [
        f"{path}: row 2: field 'prompt': expected a string or a list of chat messages",
        f"{path}: row 3: field 'prompt' is empty; actor_rollout.max_bad_rows=2 leaves such rows out",
    ]


def test_bad_utf8_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    texts = pa.array([b"fine", b"caf\xe9"], type=pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": texts}), path)
    (problem,) = refused(open_prompt_file, path)
    assert problem.startswith(f"{path}: row 2: not UTF-8")


def test_the_report_names_all_problems_up_to_ten(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join('{"prompt": ""}\n' if i % 2 else '{"prompt": "x"}\n' for i in range(40)))
    problems = refused(open_prompt_file, path)
    assert [problem.split(": ")[0] for problem in problems[:10]] == [f"{path}:{2 * i + 2}" for i in range(10)]
    assert problems[10] == (
        "... and 10 more: 20 of 40 rows are wrong; actor_rollout.max_bad_rows=20 leaves such rows out"
    )
