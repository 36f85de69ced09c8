"""Every folder that others load, and indexed data, is old or new after a crash, and on disk before it has its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from rlxf.core.errors import DataError
from rlxf.core.files import remove_leftovers
from rlxf.data.indexed import IndexedRows, IndexedWriter
from rlxf.models.hf_folder import HfWeights, save_hf_folder
from rlxf.models.peft_folder import WEIGHTS, save_adapter
from tests.crash import die_at, recorded
from tests.tiny_models import save_causal_lm
from tests.unit.tools.convert.helpers import run as convert

Write = Callable[[Path, float], object]  # a model of that number
Read = Callable[[Path], float]


def write_hf(folder: Path, value: float) -> None:
    like = folder.parent.parent / "like"
    like.mkdir(exist_ok=True)
    (like / "config.json").write_text("{}")
    save_hf_folder(folder, [("weight", torch.full((2,), value))], like=like, changes={"value": value})


def read_hf(folder: Path) -> float:
    value = float(HfWeights(folder).read("weight")[0])
    assert json.loads((folder / "config.json").read_text())["value"] == value
    return value


ADAPTER = "model.layers.0.self_attn.o_proj.lora_A.weight"


def write_adapter(folder: Path, value: float) -> None:
    tensors = [(ADAPTER, torch.full((2, 4), value))]
    save_adapter(folder, tensors, rank=2, alpha=value, dropout=0.0, base="base")


def read_adapter(folder: Path) -> float:
    from safetensors.torch import load_file

    value = float(next(iter(load_file(folder / WEIGHTS).values()))[0, 0])
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == value
    return value


WRITERS = [pytest.param(write_hf, read_hf, id="hf"), pytest.param(write_adapter, read_adapter, id="adapter")]


@pytest.mark.parametrize(("write", "read"), WRITERS)
def test_a_crash_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path: Path, write: Write, read: Read) -> None:
    found = []
    for number in range(1, 200):
        folder = tmp_path / str(number) / "model"
        write(folder, 1.0)
        died = die_at(number, partial(write, folder, 2.0))
        remove_leftovers(folder.parent, "model")
        found.append(read(folder))
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if not died:
            break
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 2)


@pytest.mark.parametrize(("write", "read"), WRITERS)
def test_every_file_is_on_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, read: Read
) -> None:
    folder = tmp_path / "run" / "model"
    calls = recorded(monkeypatch)
    write(folder, 1.0)
    renamed = next(number for number, (call, _, to) in enumerate(calls) if call == "rename" and to == folder)
    temporary = calls[renamed][1]
    synced = {
        path.relative_to(temporary)
        for call, path, _ in calls[:renamed]
        if call == "fsync" and path != temporary.parent and path.is_relative_to(temporary)
    }
    assert synced == {Path("."), *(path.relative_to(folder) for path in folder.rglob("*"))}
    assert ("fsync", folder.parent, folder.parent) in calls[renamed:]


def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    write_hf(folder, 1.0)

    def broken() -> object:
        yield "weight", torch.zeros(2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_hf_folder(folder, broken(), like=tmp_path / "like", changes={})  # type: ignore[arg-type]
    assert read_hf(folder) == 1.0
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_converted_model_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    """A crash between the two renames of an earlier ``--overwrite``."""
    source = save_causal_lm(tmp_path / "source", num_hidden_layers=1)
    result = tmp_path / "result"
    convert(source, result)
    result.rename(tmp_path / ".result.01234567.aside")
    with pytest.raises(Exception, match="exists already"):
        convert(source, result)
    assert (result / "iter_0000001" / ".metadata").is_file()


def write_indexed(prefix: Path, value: int) -> None:
    with IndexedWriter({key: f"{prefix}_packed_{key}_document" for key in ("input_ids", "labels")}) as writer:
        writer.add({"input_ids": [value] * value, "labels": [value] * value})


def test_indexed_files_are_never_mixed_and_are_on_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 60):
        prefix = tmp_path / str(number) / "rows"
        write_indexed(prefix, 1)
        died = die_at(number, partial(write_indexed, prefix, 2))
        try:
            row = IndexedRows(prefix)[0]
        except DataError:  # one of the files is missing, and it says so
            assert died
        else:
            (ids,) = {tuple(ids) for ids in row.values()}  # of all keys that are there
            assert ids in ((1,), (2, 2))
        if not died:
            break
    assert row == {"input_ids": [2, 2], "labels": [2, 2]}
    calls = recorded(monkeypatch)
    write_indexed(prefix, 1)
    renamed = [number for number, (call, _, _) in enumerate(calls) if call == "replace"]
    synced = {path for call, path, _ in calls[: renamed[0]] if call == "fsync"}
    assert len(renamed) == 4
    assert synced >= {calls[number][1] for number in renamed}
    assert calls[renamed[-1] + 1][:2] == ("fsync", prefix.parent)
