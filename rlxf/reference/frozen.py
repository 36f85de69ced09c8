"""A reference of its own: the starting weights, never updated."""

from __future__ import annotations

import torch
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.models.backend import load_model, sum_rows, token_logps
from rlxf.platform.base import Platform, Process
from rlxf.types import PairLogps, Pairs, Sequences


class FrozenReference:
    """One rank of the reference. Every rank of the role is called with the same arguments.

    Raises:
        ModelError: ``ref.load`` does not hold a causal language model.
    """

    def __init__(self, config: RunConfig, platform: Platform, process: Process) -> None:
        self.model = load_model(config, "ref", platform, process)
        self.model.gpt.requires_grad_(False).eval()
        self._pairs_per_forward = config.ref.micro_batch_size

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token."""
        return token_logps(self.model, sequences, sequences_per_forward=2 * self._pairs_per_forward)

    def logps(self, pairs: Pairs) -> PairLogps:
        """Log-probabilities of both sides, summed over the completion tokens.

        The pairs are packed as the actor packs its micro-batches, so that an untrained actor has a margin of exactly 0.
        """
        num_pairs = len(pairs)
        both = Sequences.concat([pairs.chosen, pairs.rejected])
        pieces = torch.split(torch.arange(num_pairs), self._pairs_per_forward)
        order = torch.cat([torch.cat([rows, rows + num_pairs]) for rows in pieces])  # [2N] rows of `both`
        packed = both.select(order)
        values = torch.split(self.token_logps(packed), packed.completion_lengths.tolist())
        sums = torch.empty(2 * num_pairs)
        for rows in torch.split(torch.arange(2 * num_pairs), 2 * self._pairs_per_forward):
            lengths = packed.completion_lengths[rows]
            sums[order[rows]] = sum_rows(torch.cat([values[row] for row in rows.tolist()]), lengths)
        return PairLogps(chosen=sums[:num_pairs], rejected=sums[num_pairs:])
