"""Checksums of tensors: the same for the same bytes, another one for any change, and deaf to what fills a bucket up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlxf.core.errors import SyncError
from rlxf.sync import checksums as module
from rlxf.sync.checksums import checksums, compare
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets


def bucket_of(*shapes: tuple[int, ...], dtype: str = "bfloat16") -> Bucket:
    (bucket,) = plan_buckets((TensorSpec(f"layers.{i}.w", shape, dtype) for i, shape in enumerate(shapes)), 2**30)
    return bucket


def payload_of(bucket: Bucket, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (bucket.num_bytes,), dtype=torch.uint8, generator=draw)


BUCKET = bucket_of((5, 7), (3,), (64, 64))


@given(place=st.integers(0, BUCKET.num_bytes - 1), bit=st.integers(0, 7))
def test_a_bit_changes_the_sum_of_its_tensor_and_of_no_other(place: int, bit: int) -> None:
    payload, changed = payload_of(BUCKET), payload_of(BUCKET)
    changed[place] ^= 1 << bit
    before, after = checksums(BUCKET, payload), checksums(BUCKET, changed)
    inside = {spec.name for spec in BUCKET.tensors if spec.offset <= place < spec.offset + spec.num_bytes}
    assert {name for name in before if before[name] != after[name]} == inside


@given(st.data())
def test_bytes_that_change_places_change_the_sum(data: st.DataObject) -> None:
    bucket = bucket_of((6, 8), dtype="float32")
    rows = payload_of(bucket).view(torch.float32).view(6, 8)
    one, other = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True))
    swapped = rows.clone()
    swapped[[one, other]] = rows[[other, one]]
    sums = [checksums(bucket, tensor.view(-1).view(torch.uint8)) for tensor in (rows, swapped)]
    assert sums[0] != sums[1]


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checksums(BUCKET, payload_of(BUCKET))
    monkeypatch.setattr(module, "_PIECE", 100)
    assert checksums(BUCKET, payload_of(BUCKET)) == whole


def test_a_difference_names_who_and_what() -> None:
    sent = checksums(BUCKET, payload_of(BUCKET))
    compare(sent, dict(sent), "engine 1")
    with pytest.raises(SyncError, match=r"engine 1 received other bytes .* 1 of 3 tensors .* first is layers\.1\.w"):
        compare(sent, sent | {"layers.1.w": 0}, "engine 1")
    with pytest.raises(SyncError, match=r"3 of 3 tensors"):
        compare(sent, {}, "engine 1")
