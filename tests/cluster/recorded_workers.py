"""The worker classes, whose methods are written down (``recorded.py``). Workers import this module by its name."""

from __future__ import annotations

import time
from typing import Any

from rlxf.config.kinds import Role
from tests.cluster.recorded import METHODS, Recorded, write
from workers import crew


def _recorded(role: Role, name: str, owner: str) -> Any:
    worker: Any = crew.WORKERS[role]
    original = getattr(worker, name)

    def method(self: Any, *args: Any) -> Any:
        begin = time.monotonic()
        try:
            return original(self, *args)
        finally:
            write(Recorded(role, self.rank, name, begin, time.monotonic()))

    method.__name__, method.__qualname__ = name, f"{owner}.{name}"  # Ray finds it by its name
    return method


class RecordedActor(crew.ActorWorker):
    locals().update({name: _recorded("train", name, "RecordedActor") for name in METHODS["train"]})


class RecordedEngine(crew.RolloutWorker):
    locals().update({name: _recorded("infer", name, "RecordedEngine") for name in METHODS["infer"]})


WORKERS: dict[Role, type] = {"train": RecordedActor, "infer": RecordedEngine}
