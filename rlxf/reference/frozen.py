"""A reference that is a model of its own: the starting weights, which never change unless the recipe moves them."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from rlxf.core.types import Pairs, PairValues, Sequences
from rlxf.models.backend import pair_logps, token_logps
from rlxf.models.batching import MicroBatchLimits
from rlxf.models.hf_folder import HfWeights, save_hf_folder
from rlxf.sync.plan import Bucket

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel
    from rlxf.models.megatron.moving import MovingWeights

log = logging.getLogger(__name__)


class FrozenReference:
    """One rank of the reference. Every rank of the role is called with the same arguments.

    Args:
        model: this rank's share of it.
        limits: of one forward pass.
        moves: whether the run moves it.
        ld_alpha: weight of the tokens by which one side of a pair is longer; None: all count the same.
    """

    def __init__(
        self,
        model: MegatronModel,
        limits: MicroBatchLimits,
        *,
        moves: bool = False,
        ld_alpha: float | None = None,
    ) -> None:
        self.model = model
        self.model.requires_grad_(False)
        self._limits, self._ld_alpha = limits, ld_alpha
        if moves:
            _ = self._moving  # allocate its memory at the start, not after hours

    @cached_property
    def _moving(self) -> MovingWeights:
        from rlxf.models.megatron.moving import MovingWeights

        return MovingWeights(self.model)

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token."""
        return token_logps(self.model, sequences, self._limits)

    def logps(self, pairs: Pairs) -> PairValues:
        """Log-probabilities of both sides, summed over the completion tokens.

        An untrained actor that forms the same micro-batches has a margin of exactly 0.
        """
        return pair_logps(self.model, pairs, self._limits, ld_alpha=self._ld_alpha)

    def mix(self, bucket: Bucket, payload: Tensor, alpha: float) -> None:
        """Move the bucket's parameters: ``alpha`` times what it holds, plus ``1 - alpha`` times what they were.

        Args:
            bucket: whole layers of the policy, by their Hugging Face names.
            payload: [num_bytes] uint8.
            alpha: 1 takes over the policy's.
        """
        tensors = dict(bucket.views(payload))
        self._moving.blend(tensors, tensors.__getitem__, alpha)

    def save(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder in fp32, for ``load``; every rank takes part."""
        tensors = self._moving.export()
        if dist.get_rank() == 0:
            changes = self.model.config_changes() | {"dtype": "float32"}
            save_hf_folder(folder, tensors, like=self.model.folder, changes=changes)
        else:
            for _ in tensors:
                continue
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Load the weights that ``save`` wrote in any layout, one parameter at a time."""
        weights = HfWeights(folder)
        names = weights.names()
        dtype = weights.read(next(iter(names))).dtype
        if dtype.itemsize < 4 and dist.get_rank() == 0:
            kind = str(dtype).removeprefix("torch.")
            log.warning(
                "%s: an earlier version wrote the reference in %s; the moves continue from these rounded weights",
                folder,
                kind,
            )
        self._moving.blend(names, weights.read, 1.0)
