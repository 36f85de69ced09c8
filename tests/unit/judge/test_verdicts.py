"""The file of verdicts: what is kept, through kills and torn lines."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlxf.core.errors import ConfigError
from rlxf.judge.judge import Usage, Verdict
from rlxf.judge.verdicts import VerdictStore, judge_digest, question_key
from tests.disks import disk_takes

ROOT = Path(__file__).resolve().parents[3]


def test_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.jsonl"
    with VerdictStore(path, "me") as store:
        store.add([("a", Verdict(probability=0.25)), ("b", Verdict(reply="who knows"))])
    store = VerdictStore(path, "me")
    assert store.get("a") == 0.25
    found = store.get("b")
    assert found is not None
    assert math.isnan(found)
    assert store.get("c") is None
    assert len(store) == 2


def test_what_was_spent_counts_for_the_judge_that_spent_it(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    paid = Verdict(probability=1.0, usage=Usage(prompt_tokens=10, completion_tokens=3))
    VerdictStore(path, "me").add([("a", paid), ("b", paid)])
    VerdictStore(path, "other").add([("a", paid)])
    spent = VerdictStore(path, "me").spent
    assert (spent.calls, spent.prompt_tokens, spent.completion_tokens) == (2, 20, 6)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictStore(path, "me").add([(name, Verdict(probability=0.5)) for name in "abc"])
    path.write_bytes(path.read_bytes()[:-cut])
    store = VerdictStore(path, "me")
    assert [store.get(name) for name in "abc"] == [0.5, 0.5, None]
    store.add([("d", Verdict(probability=1.0))])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a", "b", "d"]


def test_a_line_that_is_no_verdict_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictStore(path, "me").add([("a", Verdict(probability=0.5))])
    path.write_bytes(path.read_bytes() + b'{"judge": "me"}\n\0\0\n[]\n' + path.read_bytes().replace(b'"a"', b'"b"'))
    store = VerdictStore(path, "me")
    assert (store.get("a"), store.get("b")) == (0.5, 0.5)
    assert [f"verdicts.jsonl:{number}: no verdict" in caplog.text for number in (1, 2, 3, 4, 5)] == [
        False, True, True, True, False,
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = VerdictStore(tmp_path / "verdicts.jsonl", "me")
    store.path = tmp_path / "verdicts.jsonl"
    store.path.mkdir()
    with pytest.raises(ConfigError, match=r"verdicts\.jsonl: a verdict cannot be written"):
        store.add([("a", Verdict())])


@pytest.mark.parametrize("room", [0, 1, 30, 90])  # bytes: nothing, parts of a verdict, a verdict and a part
def test_verdicts_that_the_disk_does_not_take_are_written_with_the_next_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    path = tmp_path / "verdicts.jsonl"
    store, other = VerdictStore(path, "me"), VerdictStore(path, "you")
    store.add([("a", Verdict(probability=0.5))])
    with disk_takes(room, tmp_path):
        store.add([("b", Verdict(probability=0.25)), ("c", Verdict(probability=1.0))])
        store.add([("d", Verdict(probability=0.75))])
    assert [store.get(key) for key in "abcd"] == [0.5, 0.25, 1.0, 0.75]
    assert len(caplog.records) == 1
    assert "verdicts.jsonl: No space left on device (ENOSPC)" in caplog.text
    other.add([("a", Verdict(probability=0.125))])  # another run at the same file
    store.add([("e", Verdict(probability=0.5))])
    again = VerdictStore(path, "me")
    assert [again.get(key) for key in "abcde"] == [0.5, 0.25, 1.0, 0.75, 0.5]
    assert VerdictStore(path, "you").get("a") == 0.125
    assert "no verdict" not in caplog.text


def test_a_part_of_a_verdict_with_anothers_behind_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "verdicts.jsonl"
    store, other = VerdictStore(path, "me"), VerdictStore(path, "you")
    store.add([("a", Verdict(probability=0.5))])
    write = os.write

    def short(file: int, line: bytes) -> int:
        monkeypatch.undo()
        written = write(file, line[:30])
        with path.open("ab") as behind:
            behind.write(b"\n")
        return written

    monkeypatch.setattr(os, "write", short)
    store.add([("b", Verdict(probability=0.25))])
    other.add([("a", Verdict(probability=0.125))])
    store.add([("c", Verdict(probability=1.0))])
    again = VerdictStore(path, "me")
    assert [again.get(key) for key in "abc"] == [0.5, 0.25, 1.0]
    assert VerdictStore(path, "you").get("a") == 0.125


def test_verdicts_that_never_find_room_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disk_takes(0, tmp_path), VerdictStore(tmp_path / "verdicts.jsonl", "me") as store:
        store.add([("a", Verdict(probability=0.5))])
    assert "1 verdicts could not be written; they will be asked for again" in caplog.text
    assert VerdictStore(tmp_path / "verdicts.jsonl", "me").get("a") is None


def test_a_key_is_of_content_and_judge() -> None:
    keys = {
        question_key("me", "p", "a", "b"),
        question_key("me", "p", "b", "a"),
        question_key("me", "q", "a", "b"),
        question_key("me", [{"role": "user", "content": "p"}], "a", "b"),
        question_key("other", "p", "a", "b"),
        question_key("me", "p", "a", "b", {"answer": 4}),
        question_key("me", "pa", "", "b"),
    }
    assert len(keys) == 7
    assert question_key("me", "p", "a", "b") in keys
    assert judge_digest({"a": 1, "b": 2}) == judge_digest({"b": 2, "a": 1}) != judge_digest({"a": 1, "b": 3})


WRITER = """
import sys
from pathlib import Path
from rlxf.judge.judge import Usage, Verdict
from rlxf.judge.verdicts import VerdictStore

store = VerdictStore(Path(sys.argv[1]), "me")
number = len(store)
while True:
    store.add([(str(number), Verdict(probability=0.5, usage=Usage(), reply="x" * 1000))])
    print(number, flush=True)
    number += 1
"""


def test_a_killed_process_leaves_every_verdict_that_it_had_written(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    expected = 0
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == str(expected)
        time.sleep(0.1)
        os.kill(writer.pid, signal.SIGKILL)
        told = [expected, *(int(line) for line in writer.stdout if line.endswith("\n"))]
        writer.wait()
        store = VerdictStore(path, "me")
        assert all(store.get(str(number)) == 0.5 for number in range(told[-1] + 1))
        assert store.spent.calls == len(store) in (told[-1] + 1, told[-1] + 2)
        expected = len(store)
