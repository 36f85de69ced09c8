"""The actor's processes, and the actor as the driver sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlxf import assemble
from rlxf.config.schema import RunConfig
from rlxf.sync.plan import Bucket
from rlxf.types import Metrics, PairLogps, Pairs, ReferencedPairs, Sequences
from workers.group import WorkerGroup
from workers.remote import Pending
from workers.worker import Worker


class ActorWorker(Worker):
    """One rank of the actor."""

    def build(self, config: RunConfig, master: tuple[str, int]) -> None:
        self.room = assemble.build_actor(config, *self.place(config, master))

    def update(self, batch: ReferencedPairs, step: int) -> Metrics | None:
        return self.answer(self.room.update(batch, step))

    def token_logps(self, sequences: Sequences) -> Tensor | None:
        return self.answer(self.room.token_logps(sequences))

    def base_token_logps(self, sequences: Sequences) -> Tensor | None:
        return self.answer(self.room.base_token_logps(sequences))

    def base_logps(self, pairs: Pairs) -> PairLogps | None:
        return self.answer(self.room.base_logps(pairs))

    def sync_plan(self) -> tuple[Bucket, ...] | None:
        return self.answer(self.room.sync_plan())

    def export_bucket(self, index: int) -> Any:
        return self.answer(self.room.export_bucket(index).numpy())  # an array travels without a copy

    def save_hf(self, folder: Path) -> None:
        self.room.save_hf(folder)

    def save_checkpoint(self, folder: Path, background: bool) -> None:
        self.room.save_checkpoint(folder, background)

    def checkpoint_written(self, wait: bool) -> bool | None:
        return self.answer(self.room.checkpoint_written(wait))

    def load_checkpoint(self, folder: Path) -> None:
        self.room.load_checkpoint(folder)


class RemoteActor:
    """The actor on its worker processes."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self.exports: list[Pending] = []  # started, not yet waited for: the sink does

    def update(self, batch: ReferencedPairs, step: int) -> Metrics:
        metrics: Metrics = self._group.call("update", batch, step)
        return metrics

    def token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._group.call("token_logps", sequences)
        return logps

    def base_token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._group.call("base_token_logps", sequences)
        return logps

    def base_logps(self, pairs: Pairs) -> PairLogps:
        logps: PairLogps = self._group.call("base_logps", pairs)
        return logps

    def sync_plan(self) -> tuple[Bucket, ...]:
        plan: tuple[Bucket, ...] = self._group.call("sync_plan")
        return plan

    def export_bucket(self, index: int) -> Any:
        """A reference to the bucket's bytes: they go from the actor to the engines without passing through here."""
        calls = self._group.send("export_bucket", index)
        self.exports += calls
        return calls[0].ref

    def save_hf(self, folder: Path) -> None:
        self._group.call("save_hf", folder)

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        self._group.call("save_checkpoint", folder, background)

    def checkpoint_written(self, wait: bool) -> bool:
        written: bool = self._group.call("checkpoint_written", wait)
        return written

    def load_checkpoint(self, folder: Path) -> None:
        self._group.call("load_checkpoint", folder)
