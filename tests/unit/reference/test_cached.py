"""Reference log-probabilities on disk: asked for once, whatever the order, and never wrong."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlxf.core.errors import DiskError
from rlxf.core.files import file_digest
from rlxf.core.types import Pairs, PairValues, Sequences
from rlxf.reference import cached as cached_module
from rlxf.reference.cached import CachedReference, cache_folder
from tests.disks import disk_takes
from tests.settings import random_pairs
from tests.tiny_models import save_causal_lm


class Counting:
    """Gives each pair numbers of its own, and counts what it is asked for."""

    def __init__(self) -> None:
        self.num_pairs = 0

    def token_logps(self, sequences: Sequences) -> Tensor:
        return torch.zeros(int(sequences.completion_lengths.sum()))

    def logps(self, pairs: Pairs) -> PairValues:
        self.num_pairs += len(pairs)
        chosen, rejected = (
            torch.tensor([-sum(row) / 7 for row in side.rows()], dtype=torch.float32)
            for side in (pairs.chosen, pairs.rejected)
        )
        return PairValues(chosen=chosen, rejected=rejected)


def equal(found: PairValues, expected: PairValues) -> bool:
    return torch.equal(found.chosen, expected.chosen) and torch.equal(found.rejected, expected.rejected)


def test_a_pair_is_computed_once_over_runs_and_orders(tmp_path: Path) -> None:
    pairs, inner = random_pairs(9), Counting()
    expected = Counting().logps(pairs)
    first = CachedReference(inner, tmp_path / "model")
    assert equal(first.logps(pairs.select(torch.arange(5))), expected.select(torch.arange(5)))
    assert equal(first.logps(pairs), expected)
    assert inner.num_pairs == 9
    again = CachedReference(inner, tmp_path / "model")
    order = torch.tensor([8, 3, 0, 7, 1, 2, 6, 5, 4])
    assert equal(again.logps(pairs.select(order)), expected.select(order))
    assert again.fill([pairs]) == 0
    assert inner.num_pairs == 9


def test_a_changed_token_side_or_prompt_end_is_another_pair(tmp_path: Path) -> None:
    chosen, rejected = Sequences.from_rows([[5, 6]], [[7, 8]]), Sequences.from_rows([[5, 6]], [[9]])
    others = [
        Pairs(chosen=chosen, rejected=Sequences.from_rows([[5, 6]], [[10]])),
        Pairs(chosen=rejected, rejected=chosen),
        Pairs(chosen=Sequences.from_rows([[5, 6, 7]], [[8]]), rejected=rejected),
        Pairs(chosen=Sequences.from_rows([[5, 6]], [[7, 8, 5, 6, 9]]), rejected=rejected),
    ]
    inner = Counting()
    cached = CachedReference(inner, tmp_path / "model")
    cached.logps(Pairs(chosen=chosen, rejected=rejected))
    for number, other in enumerate(others):
        cached.logps(other)
        assert inner.num_pairs == number + 2


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_record_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, pairs, expected = tmp_path / "model", random_pairs(4), Counting().logps(random_pairs(4))
    CachedReference(Counting(), folder).logps(pairs)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-3:]
    else:
        content[18] ^= 1  # of the first pair's number
    path.write_bytes(content)
    inner = Counting()
    cached = CachedReference(inner, folder)
    assert "1 records are damaged" in caplog.text
    assert equal(cached.logps(pairs), expected)
    assert inner.num_pairs == 1
    again = CachedReference(inner, folder)
    assert equal(again.logps(pairs), expected)
    assert inner.num_pairs == 1
    assert path.read_bytes() == content  # another run may be writing it


def test_runs_at_the_same_time_write_files_of_their_own(tmp_path: Path) -> None:
    pairs, expected, folder = random_pairs(9), Counting().logps(random_pairs(9)), tmp_path / "model"
    first, second = CachedReference(Counting(), folder), CachedReference(Counting(), folder)
    for rows in ([0, 1, 2], [3, 4]):
        first.logps(pairs.select(torch.tensor(rows)))
        second.logps(pairs.select(torch.tensor([8, *rows])))
    assert len(list(folder.iterdir())) == 2
    inner = Counting()
    third = CachedReference(inner, folder)
    third.logps(pairs.select(torch.tensor([0, 1, 2, 3, 4, 8])))
    assert inner.num_pairs == 0
    assert equal(third.logps(pairs), expected)
    assert inner.num_pairs == 3


def test_a_run_sees_whole_records_while_another_writes(tmp_path: Path) -> None:
    pairs, folder = random_pairs(3), tmp_path / "model"
    writer = CachedReference(Counting(), folder)
    writer.logps(pairs.select(torch.arange(2)))
    (path,) = folder.iterdir()
    with path.open("ab") as file:
        file.write(b"half a record")
        file.flush()
        inner = Counting()
        CachedReference(inner, folder).logps(pairs)
        assert inner.num_pairs == 1


def test_every_number_survives_the_way_from_dict_to_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of digests that end with a zero byte, as one of 256 does."""
    monkeypatch.setattr(cached_module, "_MANY", 16)
    pairs, inner, folder = random_pairs(600), Counting(), tmp_path / "model"
    expected = Counting().logps(pairs)
    cached = CachedReference(inner, folder)
    for rows in torch.randperm(600, generator=torch.Generator().manual_seed(1)).split(7):
        assert equal(cached.logps(pairs.select(rows)), expected.select(rows))
    again = CachedReference(inner, folder)
    for each in (cached, again):
        assert equal(each.logps(pairs), expected)
    assert inner.num_pairs == 600
    assert any(key.endswith(b"\0") for key in cached_module._keys(pairs))


def test_the_folder_belongs_to_weights_dtype_device_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = save_causal_lm(tmp_path / "model")
    first = cache_folder(tmp_path, model, "fp32", "cpu")
    assert cache_folder(tmp_path, model, "fp32", "cpu") == first
    others = [cache_folder(tmp_path, model, "bf16", "cpu"), cache_folder(tmp_path, model, "fp32", "npu")]
    others += [cache_folder(tmp_path, model, "fp32", "cpu", alpha) for alpha in (0.0, 0.5, 1.0)]
    monkeypatch.setattr(cached_module, "VERSION", 1 + cached_module.VERSION)
    others.append(cache_folder(tmp_path, model, "fp32", "cpu"))
    monkeypatch.undo()
    monkeypatch.setattr("rlxf.__version__", "0.0.0")
    others.append(cache_folder(tmp_path, model, "fp32", "cpu"))
    monkeypatch.undo()
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    others.append(cache_folder(tmp_path, model, "fp32", "cpu"))
    assert len({first, *others}) == 9
    assert "earlier version" not in caplog.text


def test_a_file_of_an_earlier_version_is_named_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = save_causal_lm(tmp_path / "model")
    digest = hashlib.sha256(b"fp32")
    for name in ("config.json", "model.safetensors"):
        digest.update(file_digest(model / name).encode())
    old = tmp_path / f"{digest.hexdigest()[:32]}.logps"
    CachedReference(Counting(), tmp_path / "other").logps(random_pairs(2))
    (written,) = (tmp_path / "other").iterdir()
    written.rename(old)
    inner = Counting()
    CachedReference(inner, cache_folder(tmp_path, model, "fp32", "cpu")).logps(random_pairs(2))
    assert f"{old} was written by an earlier version and is not used" in caplog.text
    assert inner.num_pairs == 2


@pytest.mark.parametrize("room", [0, 40])  # bytes: nothing, a record and a part
def test_records_that_the_disk_does_not_take_are_written_later(tmp_path: Path, room: int) -> None:
    folder, pairs, expected = tmp_path / "model", random_pairs(9), Counting().logps(random_pairs(9))
    cached = CachedReference(Counting(), folder)
    cached.logps(pairs.select(torch.arange(3)))
    with disk_takes(room, tmp_path):
        assert equal(cached.logps(pairs), expected)
    assert cached.fill([pairs]) == 0
    inner = Counting()
    assert equal(CachedReference(inner, folder).logps(pairs), expected)
    assert inner.num_pairs == 0


def test_a_folder_that_cannot_be_written_is_told_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"Not a directory \(ENOTDIR\); name a folder .* in ref\.cache"):
        CachedReference(Counting(), tmp_path / "file" / "model").logps(random_pairs(1))
