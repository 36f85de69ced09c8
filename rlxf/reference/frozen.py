"""A reference of its own: the starting weights, which training does not touch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.models.backend import load_model, pair_logps, token_logps
from rlxf.models.batching import Limits
from rlxf.models.hf_folder import HfWeights, save_hf_folder
from rlxf.platform.base import Platform, Process
from rlxf.sync.plan import Bucket
from rlxf.types import PairLogps, Pairs, Sequences


class FrozenReference:
    """One rank of the reference. Every rank of the role is called with the same arguments.

    Raises:
        ModelError: ``ref.load`` does not hold a causal language model.
    """

    def __init__(self, config: RunConfig, platform: Platform, process: Process) -> None:
        self.model = load_model(config, "ref", platform, process)
        self.model.requires_grad_(False)
        self._limits = Limits.of(config.ref)

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token."""
        return token_logps(self.model, sequences, self._limits)

    def logps(self, pairs: Pairs) -> PairLogps:
        """Log-probabilities of both sides, summed over the completion tokens.

        An untrained actor that forms the same micro-batches has a margin of exactly 0.
        """
        return pair_logps(self.model, pairs, self._limits)

    @torch.no_grad()
    def mix(self, bucket: Bucket, payload: Tensor, alpha: float) -> None:
        """Move the bucket's parameters: ``alpha`` times what it holds, plus ``1 - alpha`` times what they were.

        Args:
            bucket: whole layers of the policy, by their Hugging Face names.
            payload: [num_bytes] uint8.
            alpha: 1 takes over the policy's.
        """
        self.model.blend(dict(bucket.views(payload)), alpha)

    def save(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder, for ``load``; every rank takes part."""
        tensors = self.model.export([name for name, _ in self.model.exported_shapes()])
        if dist.get_rank() == 0:
            save_hf_folder(folder, tensors, like=self.model.folder, changes=self.model.config_changes())
        else:
            for _ in tensors:
                continue
        dist.barrier()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take over the weights that ``save`` wrote, whatever layout wrote them."""
        weights = HfWeights(folder)
        self.model.blend({name: weights.read(name) for name in weights.names()}, 1.0)
