"""What a process has loaded is left out of the search for cycles before the first step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.assembly import start
from workers.reference import ReferenceWorker

SOMETHING: Any = SimpleNamespace(
    name="cpu",
    actor_rollout=SimpleNamespace(load=None),
    training=SimpleNamespace(eval_only=False, train_iters=1),
)


@pytest.fixture(autouse=True)
def _nothing_is_left_out() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = []
    for name in ("report_settings", "make_report", "build_run"):
        monkeypatch.setattr(start, name, lambda *given, **named: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(start, "train", lambda run: left_out.append(gc.get_freeze_count()))
    data = SimpleNamespace(say_dropped=lambda: None)
    found: Any = SimpleNamespace(config=SOMETHING, run_dir=None, data=data, resume=None)
    start.run_prepared(found, SOMETHING, platform=SOMETHING, clock=SOMETHING, stop=SOMETHING, lanes=SOMETHING)
    assert left_out[0] > 0


def test_by_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [object()]  # a list is among what is searched
    worker = ReferenceWorker(0, 1)
    monkeypatch.setattr(ReferenceWorker, "make", staticmethod(lambda *given: loaded))
    monkeypatch.setattr(worker, "place", lambda config, master: (SOMETHING, SOMETHING))
    worker.build(SOMETHING, ("", 0))
    assert worker.room is loaded
    assert all(each is not loaded for each in gc.get_objects())
