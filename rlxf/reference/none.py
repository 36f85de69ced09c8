"""No reference: for losses that compare the policy with itself only, and for stages without preferences."""

from __future__ import annotations

import torch
from torch import Tensor

from rlxf.core.types import Pairs, PairValues, Sequences


class NoReference:
    """Gives zeros. A run has it only if no loss reads them."""

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 zeros."""
        return torch.zeros(int(sequences.completion_lengths.sum()))

    def logps(self, pairs: Pairs) -> PairValues:
        return PairValues(chosen=torch.zeros(len(pairs)), rejected=torch.zeros(len(pairs)))
