"""What the comparisons share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.fixed_data import FixedPrompt, make_fixed_data, save_policy_and_reference


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, and no second thread on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference: two tiny Llamas in fp32 that differ a little."""
    return save_policy_and_reference(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def rows() -> list[FixedPrompt]:
    return make_fixed_data(48)
