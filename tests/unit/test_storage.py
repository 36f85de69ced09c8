"""Nodes that do not share a folder are found before the first step; without Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import CheckpointError, WorkerLost
from workers import storage
from workers.group import Member
from workers.storage import check_tokens
from workers.worker import Worker


class Nodes:
    """Workers, each on a node of its own, where the run's folder may be another one."""

    def __init__(self, folder: Path, *mounts: Path) -> None:
        self.folder = folder
        self.members = [
            Member(Worker(i, len(mounts)), f"train rank {i}", f"10.0.0.{i + 1}") for i in range(len(mounts))
        ]
        self.mounts = mounts
        self.lost: str | None = None

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Sequence[object]:
        if method == self.lost:
            raise WorkerLost("lost train rank 1")
        answers = []
        for member, mount, (folder, *rest) in zip(self.members, self.mounts, arguments, strict=True):
            assert folder == self.folder
            answers.append(getattr(member.handle, method)(mount, *rest))
        return answers

    def check(self) -> None:
        check_tokens(self.folder, "actor_rollout.save", self.members, here="10.0.0.9", ask=self.ask)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SEEN_S", 0.0)


def test_a_folder_that_all_share_is_left_as_it_was(tmp_path: Path) -> None:
    Nodes(tmp_path, tmp_path, tmp_path).check()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_nodes_own_is_told_with_both_nodes(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    with pytest.raises(CheckpointError) as caught:
        Nodes(shared, shared, other).check()
    for part in (str(shared), "node 10.0.0.1 does not see what node 10.0.0.2 has written", "actor_rollout.save"):
        assert part in str(caught.value)
    assert [*shared.iterdir(), *other.iterdir()] == []


def test_the_drivers_own_folder_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "ranks").mkdir()
    nodes = Nodes(tmp_path / "driver", tmp_path / "ranks", tmp_path / "ranks")
    with pytest.raises(CheckpointError, match=r"node 10\.0\.0\.1 does not see what node 10\.0\.0\.9 has written"):
        nodes.check()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, tmp_path, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"node 10\.0\.0\.2 cannot write there: No such file or directory"):
        nodes.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"node 10\.0\.0\.9 cannot write there: Permission denied"):
        Nodes(tmp_path, tmp_path).check()


@pytest.mark.parametrize("method", ["storage_token", "missing_tokens"])
def test_a_lost_worker_is_what_is_told(tmp_path: Path, method: str) -> None:
    nodes = Nodes(tmp_path, tmp_path, tmp_path)
    nodes.lost = method
    with pytest.raises(WorkerLost):
        nodes.check()
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: (tmp_path / "late").write_text("x"))
    assert storage.missing_tokens(tmp_path, ["late"], patience_s=60) == []
    assert storage.missing_tokens(tmp_path, ["never"], patience_s=0) == ["never"]
