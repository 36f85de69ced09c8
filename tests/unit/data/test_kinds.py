"""Every kind of data path gives the rows that were written, in order and in any order."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import DataError
from rlxf.core.jsonl import Row, RowProblems
from rlxf.data.readers import open_rows
from rlxf.data.spans import CsvRows, JsonList
from tests.data_world import write_rows

ROWS: list[Row] = [
    {"prompt": f"čo je {i}?\n", "chosen": [{"role": "user", "content": f'"{i}", c'}], "n": i} for i in range(23)
]


def anything(row: Row) -> str | None:
    return None


def no_threes(row: Row) -> str | None:
    return "it is a three" if row["n"] == 3 else None


def write_list(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text(" \n" + json.dumps(ROWS, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=5)
    return folder / "a.parquet"


def write_arrow(folder: Path, new: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder / "a.arrow"


def write_folder(folder: Path) -> Path:
    inside = folder / "many"
    inside.mkdir()
    for start in (0, 10, 20):
        write_rows(inside / f"part{start:02}.jsonl", ROWS[start : start + 10])
    (inside / "README.md").write_text("not data")
    (inside / ".hidden.parquet").write_text("not data either")
    return inside


def save_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "hf", num_shards=3)
    return folder / "hf"


def save_selected_dataset(folder: Path) -> Path:
    reverse = datasets.Dataset.from_list(ROWS[::-1])
    reverse.select(range(len(ROWS))[::-1]).save_to_disk(folder / "hf")
    return folder / "hf"


def save_datasets(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(splits).save_to_disk(folder / "hf")
    return folder / "hf"


KINDS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: write_rows(folder / "a.jsonl", ROWS),
    "json lines": lambda folder: write_rows(folder / "a.json", ROWS),
    "json list": write_list,
    "parquet": write_parquet,
    "arrow file": lambda folder: write_arrow(folder, pa.ipc.new_file),
    "arrow stream": lambda folder: write_arrow(folder, pa.ipc.new_stream),
    "folder": write_folder,
    "dataset": save_dataset,
    "dataset with an index": save_selected_dataset,
    "datasets": save_datasets,
}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS.keys())
def test_rows_come_back_as_they_were_written(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = open_rows(write(tmp_path), anything)
    assert [file[i] for i in range(len(file))] == ROWS
    assert [file[i] for i in reversed(range(len(file)))] == ROWS[::-1]
    assert file.columns == ("prompt", "chosen", "n")
    assert file.bad == {}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS.keys())
def test_a_wrong_row_keeps_its_number_and_stops_the_run_unless_it_is_allowed(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError, match="it is a three"):
        open_rows(path, no_threes)
    file = open_rows(path, no_threes, RowProblems(allowed=1))
    assert file.bad == {3: "it is a three"}
    assert (len(file), file[4]["n"], file[22]["n"]) == (23, 4, 22)


def test_a_row_of_a_list_and_of_a_folder_is_named_by_its_own_file_and_line(tmp_path: Path) -> None:
    lines = open_rows(write_list(tmp_path), anything)
    text = lines.path.read_text(encoding="utf-8").splitlines()
    assert [text[int(lines.where(row).split(":")[-1]) - 1].strip() for row in (0, 7, 22)] == ["{"] * 3
    folder = open_rows(write_folder(tmp_path), anything)
    assert folder.where(12) == f"{tmp_path}/many/part10.jsonl:3"


def test_parts_of_a_dataset_dict_are_its_splits(tmp_path: Path) -> None:
    path = save_datasets(tmp_path)
    assert [len(open_rows(path, anything, part=part)) for part in ("train", "valid", "test")] == [23, 2, 2]  # type: ignore[arg-type]
    datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS), "b": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        tmp_path / "other"
    )
    with pytest.raises(DataError, match=r"holds the splits a, b; expected train, or name one split's folder"):
        open_rows(tmp_path / "other", anything)


def test_a_list_without_rows_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ]\n")
    with pytest.raises(DataError, match="holds no rows"):
        open_rows(tmp_path / "a.json", anything)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 3]),
    plain=st.booleans(),
    chunk=st.sampled_from([1, 7, 2**18]),
)
def test_any_list_of_objects_is_read_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], indent: int | None, plain: bool, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=plain), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlxf.data.spans._CHUNK_BYTES", chunk)
        file = JsonList(path, anything, RowProblems())
    assert [file[i] for i in range(len(file))] == rows


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2)),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_any_csv_that_the_standard_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]], end: str, bom: bool
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("prompt", "n"), *records, ("last", "1")])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    file = CsvRows(path, anything, RowProblems())
    assert [tuple(file[i].values()) for i in range(len(file))] == [*records, ("last", "1")]
    assert file.columns == ("prompt", "n")


def test_a_csv_record_is_named_by_the_line_where_it_starts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\n"two\nlines",1\n\nx,2\n"y\nz",3\n')
    file = CsvRows(tmp_path / "a.csv", anything, RowProblems())
    assert [file.where(i).split(":")[-1] for i in range(3)] == ["2", "5", "6"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "broken object": ("a.json", b'[{"n": 1},\n{"n": }]', "a.json:2: not JSON in this row: Expecting value"),
    "no comma": ("a.json", b'[{"n": 1}\n{"n": 2}]', "a.json:2: not a JSON list: expected ',', got '{'"),
    "no end": ("a.json", b'[{"n": 1},\n{"n": 2}', "a.json:2: not a JSON list: expected ',', got the end of the file"),
    "comma at the end": ("a.json", b'[{"n": 1},\n]', "a.json:2: not JSON in this row"),
    "two lists": ("a.json", b'[{"n": 1}]\n[]', "a.json:2: '[' after the end of the list"),
    "a list of strings": ("a.json", b'["x"]', "a.json:1: expected a JSON object, got a string ('x')"),
    "bytes in a list": ("a.json", b'[{"n": 1},\n {"n": "caf\xe9"}]', "a.json:2: not UTF-8: byte 0xe9"),
    "endless nesting": ("a.json", b"[" * 99_999, "a.json:1: not JSON in this row"),
    "short record": ("a.csv", b"prompt,n\nx\n", "a.csv:2: 1 values, but the first line names 2 columns"),
    "open quote": ("a.csv", b'prompt,n\n"x,1\n', "a.csv:2: not CSV: unexpected end of data"),
    "text behind a quote": ("a.csv", b'prompt,n\n"x"y,1\n', "a.csv:2: not CSV: "),
    "bytes in a record": ("a.csv", b"prompt,n\ncaf\xe9,1\n", "a.csv:2: not UTF-8: byte 0xe9"),
    "no record": ("a.csv", b"", "a.csv: holds no rows; expected the columns' names in the first line"),
    "header only": ("a.csv", b"prompt,n\n", "a.csv: holds no rows"),
    "a column twice": ("a.csv", b"n,n\n1,2\n", "a.csv:1: names column 'n' twice"),
    "no Arrow": ("a.arrow", b"ARROW1 this is none", "a.arrow: not an Arrow file that can be read"),
    "empty Arrow": ("a.arrow", b"", "a.arrow: not an Arrow file that can be read"),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD.values(), ids=BAD.keys())
def test_a_damaged_file_is_named_with_line_and_reason(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        open_rows(tmp_path / name, anything)
    assert raised.value.problems[0].startswith(f"{tmp_path}/{reason}")
    assert all("\n" not in problem for problem in raised.value.problems)


def test_good_records_behind_a_wrong_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\n"x"y,1\ncaf,2\n1,2,3\nlast,4\n')
    file = open_rows(tmp_path / "a.csv", anything, RowProblems(allowed=2))
    assert sorted(file.bad) == [0, 2]
    assert [file[i]["prompt"] for i in (1, 3)] == ["caf", "last"]


def test_rows_behind_bytes_that_are_no_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"n": "caf\xe9\xff"}, {"n": "\xc3\xa9"}, {"n": 3}]')
    file = open_rows(tmp_path / "a.json", anything, RowProblems(allowed=1))
    assert sorted(file.bad) == [0]
    assert [file[i]["n"] for i in (1, 2)] == ["é", 3]


def test_a_cut_arrow_file_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path, pa.ipc.new_stream)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.arrow: "):
        open_rows(path, anything)


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "a.csv").write_text("n\n1\n")
    with pytest.raises(DataError, match=r"several kinds \(a\.csv, b\.jsonl\); keep one kind in a folder"):
        open_rows(tmp_path, anything)


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    path = save_dataset(tmp_path)
    (path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: names no data files"):
        open_rows(path, anything)
    (path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: is not a JSON object"):
        open_rows(path, anything)


def test_a_missing_file_of_a_dataset_is_named(tmp_path: Path) -> None:
    path = save_dataset(tmp_path)
    next(path.glob("data-*1-of*.arrow")).unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: no such file"):
        open_rows(path, anything)
