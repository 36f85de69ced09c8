"""Moving the reference after the policy (TR-DPO, Gorbatovski et al. 2024)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from rlxf.config.roles import ReferenceConfig
from rlxf.core.errors import CheckpointError
from rlxf.sync.plan import Bucket

log = logging.getLogger(__name__)

FOLDER = "reference"  # in a checkpoint


class Weights(Protocol):
    """The actor, or a proxy of it."""

    def sync_plan(self) -> tuple[Bucket, ...]: ...

    def export_copy(self, index: int) -> Any:
        """A copy of bucket ``index`` of the plan, which training does not change.

        [num_bytes] uint8 in one process; between processes a reference to it, so that its bytes go from the actor to
        the reference without passing through the caller.
        """
        ...


class MovableReference(Protocol):
    """A reference with weights of its own, which can be moved."""

    def mix(self, bucket: Bucket, payload: Any, alpha: float) -> None:
        """``payload``: what ``Weights.export_copy`` gave."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class ReferenceUpdater:
    """Every ``ref_update_interval`` updates: reference = alpha * policy + (1 - alpha) * reference (eq. 3 and 4)."""

    def __init__(self, actor: Weights, reference: MovableReference, config: ReferenceConfig) -> None:
        self._actor = actor
        self._reference = reference
        self._config = config
        self._plan = actor.sync_plan()
        self._whole = True

    @property
    def whole(self) -> bool:
        """False during a move, and after one that broke off: then some weights have moved and others have not."""
        return self._whole

    def is_due(self, version: int) -> bool:
        """Whether the reference moves after the update that made ``version``."""
        return version % self._config.ref_update_interval == 0

    def __call__(self, version: int) -> None:
        """After the update that made ``version``; does nothing unless one is due."""
        if not self.is_due(version):
            return
        self._whole = False
        for index, bucket in enumerate(self._plan):
            self._reference.mix(bucket, self._actor.export_copy(index), self._config.ref_mixup_alpha)
        self._whole = True

    def save(self, checkpoint: Path) -> None:
        """The reference as it is now, beside the actor's state.

        Raises:
            CheckpointError: a move broke off.
        """
        if not self._whole:
            raise CheckpointError(
                f"{checkpoint}: not saved: a move of the reference failed, so only a part of its weights has moved; "
                "resume from the checkpoint before"
            )
        self._reference.save(checkpoint / FOLDER)

    def load(self, checkpoint: Path) -> None:
        """Load the reference of a resumed run. One that has not moved so far stays as it is."""
        if not (checkpoint / FOLDER).is_dir():
            log.warning(
                "%s: the run that wrote it did not move the reference; this run moves it from now on", checkpoint
            )
            return
        self._reference.load(checkpoint / FOLDER)


class NoRefresh:
    """For a reference that never moves."""

    whole = True

    def is_due(self, version: int) -> bool:
        """Never."""
        return False

    def __call__(self, version: int) -> None:
        """Nothing moves."""


no_refresh = NoRefresh()
