"""Rows come back as they were written, whatever the line endings, and a long line costs no memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlxf.core.errors import DataError
from rlxf.core.jsonl import MAX_LINE_BYTES, JsonLines, Row, RowProblems
from rlxf.data.arrow import ParquetRows
from rlxf.data.readers import open_rows
from tests.data_world import write_rows


def anything(row: Row) -> str | None:
    return None


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"číslo {i}", "n": i} for i in range(50)]
    file = open_rows(write_rows(tmp_path / "a.jsonl", rows), anything)
    assert [file[i] for i in reversed(range(50))] == rows[::-1]
    assert file.columns == ("prompt", "n")


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2, "b": 3}\r\n{"a": 4}')
    file = JsonLines(path, anything)
    assert [file[i]["a"] for i in range(len(file))] == [1, 2, 4]
    assert file.num_blank == 2
    assert [file.where(i) for i in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_json_with_one_object_per_line_is_read(tmp_path: Path) -> None:
    assert len(open_rows(write_rows(tmp_path / "a.json", [{"a": 1}] * 3), anything)) == 3


def test_equal_rows_are_all_kept(tmp_path: Path) -> None:
    assert len(open_rows(write_rows(tmp_path / "a.jsonl", [{"a": 1}] * 5), anything)) == 5


def test_a_line_too_long_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"a": 1}\n{"a": "')
        for _ in range(64):
            file.write("x" * 2**20)
        file.write('"}\n{"a": 3}\n[]\n')
    tracemalloc.start()
    with pytest.raises(DataError) as raised:
        open_rows(path, anything)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [f"{path}:2", f"{path}:4"]
    assert "4 MiB" in raised.value.problems[0]
    assert peak < 4 * MAX_LINE_BYTES


def test_a_line_of_just_the_allowed_length_is_read(tmp_path: Path) -> None:
    text = "x" * (MAX_LINE_BYTES - len('{"a": ""}'))
    file = open_rows(write_rows(tmp_path / "a.jsonl", [{"a": text}, {"a": "next"}]), anything)
    assert file[0]["a"] == text
    assert file[1]["a"] == "next"


def test_a_report_shows_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join("{}\n" if i % 2 else "{\n" for i in range(50)))
    with pytest.raises(DataError) as raised:
        open_rows(path, anything)
    assert len(raised.value.problems) == 11
    assert raised.value.problems[-1] == "... and 15 more: 25 of 50 rows are wrong"


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path: Path) -> None:
    file = open_rows(write_rows(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}]), anything)
    file.path.write_text("{}\n")
    with pytest.raises(DataError, match="changed while the run was reading it"):
        file[1]


def test_parquet_rows_equal_the_written_ones_over_row_groups(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "n": i} for i in range(25)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    file = open_rows(path, anything)
    assert isinstance(file, ParquetRows)
    assert [file[i] for i in reversed(range(25))] == rows[::-1]
    assert file.columns == ("prompt", "n")


def test_parquet_keeps_a_bounded_number_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlxf.data.arrow.CACHE_BYTES", 300)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(160))}), path, row_group_size=16)  # 128 bytes a group
    file = ParquetRows(path, anything, RowProblems())
    assert [file[i]["n"] for i in range(160)] == list(range(160))
    assert len(file._cache) == 2


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    file = open_rows(write_rows(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2, "a": 1}, {"c": 1}]), anything)
    assert file.columns == ("a", "b", "c")
    assert json.dumps(file[1]) == '{"b": 2, "a": 1}'
