"""A reference of its own: the starting weights, never updated."""

from __future__ import annotations

from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.models.backend import load_model, pair_logps, token_logps
from rlxf.models.batching import Limits
from rlxf.platform.base import Platform, Process
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
