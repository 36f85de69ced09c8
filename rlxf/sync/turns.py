"""Trainer and engines on the same devices take turns. This file is the only one that knows the order.

::

    engines sample -> engines sleep -> (scores, reference) -> trainer takes its optimizer back -> update
    -> optimizer away -> engines' weights wake -> push -> trainer frees what it does not use, on every rank
    -> engines' caches wake -> probe -> engines sample

What leaves a device leaves it before anything else comes. A call that is out of turn raises.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from rlxf.core.errors import SyncError
from rlxf.core.types import Metrics

_GIB = 2**30

Peaks = dict[str, dict[str, int]]
"""Bytes, by role and phase: the largest of the role's processes."""


class Sleeper(Protocol):
    """All rollout engines. Each call returns when all of them have done it."""

    def sleep(self) -> None: ...

    def wake_weights(self) -> None:
        """Room for weights, in those that sleep."""
        ...

    def wake_cache(self) -> None:
        """Room for a cache, in those whose weights woke."""
        ...

    def memory_peaks(self) -> dict[str, int]:
        """Bytes by phase, the largest of all engines."""
        ...


class Trainer(Protocol):
    """All ranks of the actor. Each call returns when all of them have done it."""

    def offload(self) -> None: ...

    def restore(self) -> None: ...

    def free_cache(self) -> None:
        """Give the device what the allocator holds and nobody uses."""
        ...

    def memory_peaks(self) -> dict[str, int]: ...


class _Turn(Enum):
    ENGINES = "the engines are awake"
    NOBODY = "the engines sleep and the optimizer is away"
    TRAINER = "the trainer has its optimizer"
    PUSH = "weights are being pushed"


class Turns:
    """Whose turn it is.

    Args:
        trainer: has its optimizer on the device, as after loading.
        engines: asleep, or new ones that are awake.
    """

    def __init__(self, trainer: Trainer, engines: Sleeper) -> None:
        self._trainer = trainer
        self._engines = engines
        self._turn = _Turn.TRAINER

    def sampled(self) -> None:
        """The engines have sampled what is trained on next."""
        self._require(_Turn.ENGINES, "the engines cannot go to sleep")
        self._engines.sleep()
        self._turn = _Turn.NOBODY

    def train(self) -> None:
        """Before an update. A step that an earlier process had sampled leaves the engines awake until here."""
        if self._turn is _Turn.ENGINES:
            self.sampled()
        self._require(_Turn.NOBODY, "the trainer cannot take its optimizer back")
        self._trainer.restore()
        self._turn = _Turn.TRAINER

    def push(self, push: Callable[[], None]) -> None:
        """Make a push, from any turn; the engines may sample afterwards.

        After a push that failed it is called again, and goes on where it was.
        """
        if self._turn is _Turn.TRAINER:
            self._trainer.offload()
        self._turn = _Turn.PUSH
        self._engines.wake_weights()
        push()
        self._trainer.free_cache()
        self._engines.wake_cache()
        self._turn = _Turn.ENGINES

    def metrics(self) -> Metrics:
        """``memory/<phase>/<role>``: peaks of the phases so far, GiB."""
        peaks: Peaks = {"train": self._trainer.memory_peaks(), "infer": self._engines.memory_peaks()}
        return {
            f"memory/{phase}/{role}": size / _GIB for role, phases in peaks.items() for phase, size in phases.items()
        }

    def _require(self, turn: _Turn, what: str) -> None:
        if self._turn is not turn:
            raise SyncError(f"{what}: {self._turn.value}, and {turn.value} is expected")


class NoTurns:
    """Trainer and engines have devices of their own: nobody waits for the other's memory."""

    def sampled(self) -> None: ...

    def train(self) -> None: ...

    def push(self, push: Callable[[], None]) -> None:
        push()

    def metrics(self) -> Metrics:
        return {}
