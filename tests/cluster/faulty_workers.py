"""The worker classes, whose methods meet a plan's faults (``faults.py``). Workers import this module by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlxf.config.kinds import Role
from tests.cluster.faults import PLAN, Fault
from workers import crew


def meet(role: str, rank: int, method: str, *, after: bool) -> None:
    """Count a call, and let the fault happen that is due at it."""
    plan = Path(os.environ[PLAN])
    count = plan.parent / f"{role}_{rank}_{method}_{'after' if after else 'before'}"
    with count.open("ab") as file:
        file.write(b".")
    number = count.stat().st_size
    for index, content in enumerate(json.loads(plan.read_text())):
        fault, done = Fault(**content), plan.parent / f"{index}.done"
        here = (fault.role, fault.rank, fault.method, fault.after) == (role, rank, method, after)
        if here and _is_due(fault, number, done, plan.parent / "metrics.jsonl"):
            fault.happen(done)


def _is_due(fault: Fault, call: int, done: Path, metrics: Path) -> bool:
    if fault.rows is None:
        return call == fault.call
    return not done.exists() and metrics.exists() and metrics.read_text().count("\n") >= fault.rows


def _faulty(role: Role, name: str, owner: str) -> Any:
    worker: Any = crew.WORKERS[role]
    original = getattr(worker, name)

    def method(self: Any, *args: Any) -> Any:
        meet(role, self.rank, name, after=False)
        result = original(self, *args)
        meet(role, self.rank, name, after=True)
        return result

    method.__name__, method.__qualname__ = name, f"{owner}.{name}"  # Ray finds it by its name
    return method


def _methods(role: Role, owner: str) -> dict[str, Any]:
    plan = json.loads(Path(os.environ[PLAN]).read_text())
    return {name: _faulty(role, name, owner) for name in {fault["method"] for fault in plan if fault["role"] == role}}


class FaultyActor(crew.ActorWorker):
    locals().update(_methods("train", "FaultyActor"))


class FaultyEngine(crew.RolloutWorker):
    locals().update(_methods("infer", "FaultyEngine"))


class FaultyReference(crew.ReferenceWorker):
    locals().update(_methods("ref", "FaultyReference"))


class FaultyScorer(crew.RewardWorker):
    locals().update(_methods("reward", "FaultyScorer"))


WORKERS: dict[Role, type] = {
    "train": FaultyActor,
    "infer": FaultyEngine,
    "ref": FaultyReference,
    "reward": FaultyScorer,
}
