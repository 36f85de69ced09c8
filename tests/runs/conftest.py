"""What whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runs.small import World, make_world


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, and no second thread on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))
