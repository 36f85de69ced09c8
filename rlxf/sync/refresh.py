"""Moving the reference after the policy (TR-DPO, Gorbatovski et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from rlxf.config.schema import ReferenceConfig
from rlxf.sync.plan import Bucket

FOLDER = "reference"  # in a checkpoint


class Weights(Protocol):
    """The actor, or what stands for it."""

    def sync_plan(self) -> tuple[Bucket, ...]: ...

    def export_copy(self, index: int) -> Any:
        """Bucket ``index`` of the plan, which stays as it is while training goes on."""
        ...


class Movable(Protocol):
    """A reference with weights of its own, which can be moved."""

    def mix(self, bucket: Bucket, payload: Any, alpha: float) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Refresh:
    """Every ``ref_update_interval`` updates: reference = alpha * policy + (1 - alpha) * reference (eq. 3 and 4)."""

    def __init__(self, actor: Weights, reference: Movable, config: ReferenceConfig) -> None:
        self._actor = actor
        self._reference = reference
        self._config = config
        self._plan = actor.sync_plan()

    def __call__(self, version: int) -> None:
        """After the update that made ``version``; does nothing unless one is due."""
        if version % self._config.ref_update_interval:
            return
        for index, bucket in enumerate(self._plan):
            self._reference.mix(bucket, self._actor.export_copy(index), self._config.ref_mixup_alpha)

    def save(self, checkpoint: Path) -> None:
        """The reference as it is now, beside the actor's state."""
        self._reference.save(checkpoint / FOLDER)

    def load(self, checkpoint: Path) -> None:
        """Of a run that is resumed."""
        self._reference.load(checkpoint / FOLDER)


def no_refresh(version: int) -> None:
    """For a reference that stays what it is."""
