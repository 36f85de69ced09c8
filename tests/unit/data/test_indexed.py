"""Indexed token files: ours are read by Megatron, Megatron's by us, and nothing half-written is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from rlxf.core.errors import DataError
from rlxf.data.indexed import IndexedRows, IndexedWriter, is_indexed, packed_name

ROWS = [
    {"input_ids": [5, 6, 7, 128255], "labels": [-100, -100, 7, 128255]},
    {"input_ids": [1], "labels": [1]},
    {"input_ids": [9, 8], "labels": [-100, 8]},
]


def write(prefix: Path, rows: list[dict[str, list[int]]] = ROWS) -> Path:
    with IndexedWriter({key: packed_name(prefix, key) for key in rows[0]}) as writer:
        for row in rows:
            writer.add(row)
    return prefix


def write_with_megatron(prefix: Path, dtype: type[np.number] = np.int32) -> Path:
    for key in ("input_ids", "labels"):
        builder = IndexedDatasetBuilder(f"{packed_name(prefix, key)}.bin", dtype=dtype)
        for row in ROWS:
            builder.add_document(np.array(row[key]), [len(row[key])])
        builder.finalize(f"{packed_name(prefix, key)}.idx")
    return prefix


def test_megatron_reads_what_we_write(tmp_path: Path) -> None:
    prefix = write(tmp_path / "orca")
    assert sorted(os.listdir(tmp_path)) == sorted(
        f"orca_packed_{key}_document.{suffix}" for key in ("input_ids", "labels") for suffix in ("bin", "idx")
    )
    for key in ("input_ids", "labels"):
        read = IndexedDataset(packed_name(prefix, key))
        assert read.index.dtype == np.int32
        assert [read[i].tolist() for i in range(len(read))] == [row[key] for row in ROWS]
        assert read.document_indices.tolist() == [0, 1, 2, 3]


def test_we_read_what_megatron_writes_from_prefix_and_folder(tmp_path: Path) -> None:
    prefix = write_with_megatron(tmp_path / "orca")
    for path in (prefix, tmp_path):
        rows = IndexedRows(path)
        assert rows.columns == ("input_ids", "labels")
        assert [rows[i] for i in range(len(rows))] == ROWS
        assert rows.where(1) == f"{prefix}: row 2"


def test_the_bytes_are_those_of_megatrons_builder(tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "ours"), write_with_megatron(tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        for key in ("input_ids", "labels"):
            left, right = (Path(packed_name(prefix, key) + suffix).read_bytes() for prefix in (ours, theirs))
            assert left == right


def test_other_integer_types_are_read_too(tmp_path: Path) -> None:
    rows = IndexedRows(write_with_megatron(tmp_path / "wide", np.int64))
    assert rows[0] == ROWS[0]


def test_files_are_joined_in_order(tmp_path: Path) -> None:
    parts = [write(tmp_path / name, [row]) for name, row in zip("abc", ROWS, strict=True)]
    with IndexedWriter({"labels": packed_name(tmp_path / "all", "labels")}) as writer:
        for part in parts:
            writer.append("labels", packed_name(part, "labels"))
    rows = IndexedRows(tmp_path / "all")
    assert [rows[i]["labels"] for i in range(3)] == [row["labels"] for row in ROWS]


def test_an_error_leaves_the_older_files_as_they_were(tmp_path: Path) -> None:
    prefix = write(tmp_path / "orca")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write(prefix, [{"input_ids": [3], "labels": [3]}, {"input_ids": [3]}])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_writing_again_replaces_the_files(tmp_path: Path) -> None:
    prefix = write(tmp_path / "orca")
    write(prefix, ROWS[:1])
    assert len(IndexedRows(prefix)) == 1


def test_a_path_is_known_as_indexed_or_not(tmp_path: Path) -> None:
    prefix = write(tmp_path / "orca")
    assert is_indexed(prefix)
    assert is_indexed(tmp_path)
    assert not is_indexed(tmp_path / "orc")
    assert not is_indexed(tmp_path / "nowhere" / "orca")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/orca: cannot be written to: Not a directory"):
        write(tmp_path / "file" / "orca" / "x")


def test_a_folder_with_two_prefixes_asks_for_one(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    with pytest.raises(DataError, match=r"several prefixes; give one of them: .*/a, .*/b"):
        IndexedRows(tmp_path)


def test_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "orca")
    with IndexedWriter({"labels": packed_name(prefix, "labels")}) as writer:
        writer.add({"labels": [4]})
    with pytest.raises(DataError, match=r"\{'input_ids': 3, 'labels': 1\}"):
        IndexedRows(prefix)


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".bin", lambda content: content[:-4], r"\.bin: 24 bytes, but its index promises 28"),
        (".idx", lambda content: content[:-1], r"\.idx: \d+ bytes, but its header promises"),
        (".idx", lambda content: content[:20], "not an index file of Megatron"),
        (".idx", lambda content: b"X" + content[1:], "not an index file of Megatron"),
        (".idx", lambda content: content[:9] + b"\x07" + content[10:], "version 7 with number type 4; known is"),
        (".bin", None, "no such file; the two files of a key belong together"),
    ],
)
def test_a_damaged_file_is_named(suffix: str, damage, reason: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prefix = write(tmp_path / "orca")
    file = Path(packed_name(prefix, "labels") + suffix)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=reason):
        IndexedRows(prefix)
