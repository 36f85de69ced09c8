"""From scored or judged completions to preference pairs."""

from __future__ import annotations

from rlxf.config.kinds import PairingName
from rlxf.pair.pairing import Pairing, PairingSettings
from rlxf.pair.strategies import all_pairs, best_worst, random_pair, threshold_pairs

__all__ = ["PAIRINGS", "Pairing", "PairingSettings"]

PAIRINGS: dict[PairingName, Pairing] = {
    "best_worst": best_worst,
    "all": all_pairs,
    "random": random_pair,
    "threshold": threshold_pairs,
}
"""Which completions of a prompt become its pairs, by ``algorithm.pairing``."""
