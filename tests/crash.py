"""What the system sees of code that writes files: a crash before any of its calls, and the order of these calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")


def die_at(number: int, action: Callable[[], object]) -> bool:
    """Do ``action`` in a process that dies before its n-th call to the system; whether it came to that."""
    child = os.fork()
    if not child:
        count = [0]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                count[0] += 1
                if count[0] == number:
                    os._exit(9)
                return call(*args, **options)

            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:  # noqa: BLE001  the parent sees the exit code
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Path]]:
    """Every later call that syncs, renames or deletes: its name, what it is about, and the new name."""
    calls: list[tuple[str, Path, Path]] = []

    def record(name: str) -> None:
        call = getattr(os, name)

        def wrapped(first: Any, *more: Any, **options: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else first)
            calls.append((name, path, Path(more[0]) if more else path))
            return call(first, *more, **options)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        record(name)
    return calls
