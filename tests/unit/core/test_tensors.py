"""Rows of flat tensors, against torch's own indexing."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from rlxf.core.tensors import join_slices, take
from rlxf.core.types import select_rows

VALUES = {
    "int32": torch.arange(40, dtype=torch.int32),
    "int64": torch.arange(40),
    "float32": torch.linspace(-1, 1, 40),
    "bool": torch.arange(40) % 3 == 0,
    "every second value": torch.arange(80)[::2],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("index", [[3, 0, 3], [], [39]], ids=str)
def test_taken_values_are_those_of_torch(values: Tensor, index: list[int]) -> None:
    rows = torch.tensor(index, dtype=torch.int64)
    found = take(values, rows)
    assert torch.equal(found, values[rows])
    assert found.dtype == values.dtype


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("index", [[2, 0, 2, 5], [1], [1, 1], []], ids=str)
def test_selected_rows_are_those_of_torch(values: Tensor, index: list[int]) -> None:
    lengths = torch.tensor([3, 0, 17, 1, 9, 10])
    rows = torch.split(values, lengths.tolist())
    expected = torch.cat([values[:0], *(rows[row] for row in index)])
    found = select_rows(values, lengths, torch.tensor(index, dtype=torch.int64))
    assert torch.equal(found, expected)
    assert found.dtype == values.dtype


def test_a_slice_is_a_copy_that_can_be_written_and_sent_without_the_whole() -> None:
    values = torch.arange(100_000)
    found = join_slices(values, torch.tensor([5, 20]).numpy(), torch.tensor([8, 21]).numpy())
    assert len(pickle.dumps(found)) < 2_000
    found[0] = -1
    assert found.tolist() == [-1, 6, 7, 20]
    assert values[5] == 5
