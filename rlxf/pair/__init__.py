"""From scored completions to preference pairs."""

from __future__ import annotations

from rlxf.config.kinds import PairingName
from rlxf.pair.pairing import Pairing
from rlxf.pair.strategies import best_worst

__all__ = ["PAIRINGS", "Pairing"]

PAIRINGS: dict[PairingName, Pairing] = {"best_worst": best_worst}
"""Which completions of a prompt become its pair, by ``algorithm.pairing``."""
