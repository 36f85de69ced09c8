"""The observer's view of remote calls, without a cluster: answers that are there, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlxf.core.clock import Clock, Span
from rlxf.core.stop import Stop
from workers import remote
from workers.remote import Pending, Waiter


class Seen:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Span]] = []

    def stage(self, span: Span, roles: Sequence[str]) -> None: ...

    def call(self, worker: str, span: Span) -> None:
        self.calls.append((worker, span))


def test_a_call_lasts_from_when_it_was_made_until_its_answer_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hands, seen = [10.0], Seen()
    clock = Clock((), seen, now=lambda: hands[0])
    waiter = Waiter(clock, Stop(), 60.0)

    def wait(refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        hands[0] += 1
        return refs[-1:], refs[:-1]

    monkeypatch.setattr(remote.ray, "wait", wait)
    monkeypatch.setattr(remote.ray, "get", lambda ref, **_: f"answer {ref}")
    calls = [Pending(ref, f"infer rank {rank} on node a", "generate", 9.5) for rank, ref in enumerate("xy")]
    clock.start(2)
    with clock("gen", step=3, version=1):
        assert waiter.gather(calls) == ["answer x", "answer y"]
    assert seen.calls == [
        ("infer rank 1 on node a", Span("gen", 4, 1, 9.5, 11.0)),
        ("infer rank 0 on node a", Span("gen", 4, 1, 9.5, 12.0)),
    ]
