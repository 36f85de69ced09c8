"""Files that grow, are cut and are replaced while they are read."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rlxf.report.rows import Columns, GrowingFile, number, parse


def lines(file: GrowingFile) -> list[str]:
    return [line.decode().strip() for _, line in file.lines()]


def test_a_second_look_gives_only_new_lines_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = GrowingFile(path)
    assert not file.changed()
    assert lines(file) == []
    path.write_text("one\ntwo\nthr")
    assert not file.changed()
    assert lines(file) == ["one", "two"]
    with path.open("a") as more:
        more.write("ee\nfour\n")
    assert not file.changed()
    assert lines(file) == ["three", "four"]


def test_a_file_that_was_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one\ntwo\nthree\n")
    file = GrowingFile(path)
    assert not file.changed()
    assert lines(file) == ["one", "two", "three"]
    path.write_text("one\n")
    assert file.changed()
    assert lines(file) == ["one"]


def test_a_file_that_was_cut_and_has_grown_again_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one\ntwo\n")
    file = GrowingFile(path)
    assert not file.changed()
    assert lines(file) == ["one", "two"]
    with path.open("r+") as cut:
        cut.seek(4)
        cut.write("TWO\nthree\n")
    assert file.changed()
    assert lines(file) == ["one", "TWO", "three"]


def test_a_file_that_was_replaced_or_deleted_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one\n")
    file = GrowingFile(path)
    assert not file.changed()
    assert lines(file) == ["one"]
    other = tmp_path / "other"
    other.write_text("one\ntwo\n")
    other.replace(path)
    assert file.changed()
    assert lines(file) == ["one", "two"]
    path.unlink()
    assert file.changed()
    assert not file.changed()


def test_a_line_is_found_again_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("äöü\ntwo\n")
    file = GrowingFile(path)
    places = [place for place, _ in file.lines()]
    assert file.line_at(places[1]) == b"two\n"


def test_only_objects_are_rows() -> None:
    assert parse(b'{"step": 1}') == {"step": 1}
    for line in (b'{"step": 1', b"[1]", b"", b"\xff\xfe", b"null"):
        assert parse(line) is None


def test_numbers_are_finite_or_nan() -> None:
    assert number(2) == 2.0
    for value in (None, "2", True, math.inf, math.nan):
        assert math.isnan(number(value))


def columns(*rows: str) -> Columns:
    found = Columns()
    for row in rows:
        parsed = json.loads(row)
        found.add(parsed["step"], parsed)
    return found


def test_columns_hold_nan_where_a_row_lacks_a_metric() -> None:
    found = columns('{"step": 1, "a": 1}', '{"step": 2, "b": 5, "a": null}', '{"step": 3, "a": 3, "text": "x"}')
    assert list(found.steps) == [1, 2, 3]
    assert str(list(found.values["a"])) == "[1.0, nan, 3.0]"
    assert str(list(found.values["b"])) == "[nan, 5.0, nan]"
    assert "text" not in found.values
    assert found.row(1) == {"b": 5.0}
    assert (found.first("b"), found.last("a")) == (5.0, 3.0)
    assert math.isnan(found.last("nothing"))


def test_a_step_that_is_done_again_takes_the_place_of_what_followed() -> None:
    found = columns(*(f'{{"step": {step}, "a": {step}}}' for step in (1, 2, 3, 4)), '{"step": 3, "a": 30}')
    assert list(found.steps) == [1, 2, 3]
    assert list(found.values["a"]) == [1.0, 2.0, 30.0]
    assert found.generation == 1
