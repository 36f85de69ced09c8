"""The reference's processes, and the reference as the driver sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.assembly.roles import build_reference
from rlxf.core.types import Pairs, PairValues, Sequences
from rlxf.sync.plan import Bucket

from .group import WorkerGroup
from .worker import Worker

if TYPE_CHECKING:
    from rlxf.reference.frozen import FrozenReference


class ReferenceWorker(Worker):
    """One rank of the reference."""

    make = staticmethod(build_reference)
    room: FrozenReference

    def logps(self, pairs: Pairs) -> PairValues | None:
        return self.answer(self.room.logps(pairs))

    def token_logps(self, sequences: Sequences) -> Tensor | None:
        return self.answer(self.room.token_logps(sequences))

    def mix(self, bucket: Bucket, payload: Any, alpha: float) -> None:
        """``payload``: an array of the bucket's bytes."""
        self.room.mix(bucket, torch.from_numpy(payload), alpha)

    def save(self, folder: Path) -> None:
        self.room.save(folder)

    def load(self, folder: Path) -> None:
        self.room.load(folder)


class RemoteReference:
    """The reference on its worker processes."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def logps(self, pairs: Pairs) -> PairValues:
        logps: PairValues = self._group.call("logps", pairs)
        return logps

    def token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._group.call("token_logps", sequences)
        return logps

    def mix(self, bucket: Bucket, payload: Any, alpha: float) -> None:
        """``payload``: a reference to what ``ReferenceWorker.mix`` takes."""
        self._group.call("mix", bucket, payload, alpha)

    def save(self, folder: Path) -> None:
        self._group.call("save", folder)

    def load(self, folder: Path) -> None:
        self._group.call("load", folder)
