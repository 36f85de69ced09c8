"""What a process may use: the machine's memory, or less where a container or a batch job sets a limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from rlxf.core import memory
from rlxf.core.memory import Memory, groups, machine_memory

TOTAL = 1000
V1 = "4:memory:/jobs/job_7\n3:cpuset:/\n0::/"
V2 = "0::/jobs/job_7\n"


def write(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def read(text: str, mount: Path) -> list[Memory]:
    return [found for group in groups(text, mount) if (found := group.read(TOTAL)) is not None]


def test_version_two_counts_every_group_around_the_process(tmp_path: Path) -> None:
    stat = "anon 5\ninactive_file 30"
    write(tmp_path / "jobs" / "job_7", memory__max="max", memory__current=100, memory__stat=stat)
    write(tmp_path / "jobs", memory__max=400, memory__current=150, memory__stat=stat)
    assert read(V2, tmp_path) == [Memory(limit=400, available=280)]


def test_version_one_has_other_files(tmp_path: Path) -> None:
    stat = "cache 9\ninactive_file 1\ntotal_inactive_file 40"
    write(
        tmp_path / "memory" / "jobs" / "job_7",
        memory__limit_in_bytes=500, memory__usage_in_bytes=90, memory__stat=stat,
    )  # fmt: skip
    write(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=90, memory__stat=stat)
    assert read(V1, tmp_path) == [Memory(limit=500, available=450)]


def test_in_a_container_the_root_has_the_limit(tmp_path: Path) -> None:
    """The path of the process is the host's, and only the container's own group is mounted."""
    write(tmp_path / "memory", memory__limit_in_bytes=300, memory__usage_in_bytes=350, memory__stat="rss 1")
    assert read(V1, tmp_path) == [Memory(limit=300, available=0)]


def test_whichever_has_less_left_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_groups_here", lambda: tuple(groups(V2, tmp_path)))
    assert machine_memory().limit == whole
    write(tmp_path / "jobs", memory__max=2**20, memory__current=0, memory__stat="anon 0")
    assert machine_memory() == Memory(limit=2**20, available=2**20)
