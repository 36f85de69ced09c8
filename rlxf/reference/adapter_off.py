"""The reference of a LoRA run: the actor's own model with its adapters off. No second model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rlxf.core.types import Pairs, PairValues, Sequences


class AdaptedActor(Protocol):
    """An actor that trains adapters, in this process or behind a proxy."""

    def base_token_logps(self, sequences: Sequences) -> Tensor: ...

    def base_logps(self, pairs: Pairs) -> PairValues: ...


class AdapterOffReference:
    """The frozen base, asked through the actor's processes; training never moves it."""

    def __init__(self, actor: AdaptedActor) -> None:
        self._actor = actor

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token."""
        return self._actor.base_token_logps(sequences)

    def logps(self, pairs: Pairs) -> PairValues:
        """Log-probabilities of both sides, summed over the completion tokens."""
        return self._actor.base_logps(pairs)
