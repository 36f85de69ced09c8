"""Pairs that share completions: each completion is computed once, and its log-probability is read for all its pairs.

Pure. A completion is known by its row of the step's rollouts (``RolloutPairs``); the two sides of a pair from a file
are completions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlxf.core.tensors import to_device
from rlxf.core.types import Pairs, PairValues, RolloutPairs, Sequences
from rlxf.models.batching import MicroBatchLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """The ``D`` completions of ``N`` pairs, each once: first the chosen ones, then the rejected ones that are new.

    Two pairs of one prompt, rows 2 and 0, and rows 2 and 1: ``sources = [0, 2, 3]``, ``chosen = [0, 0]``,
    ``rejected = [1, 2]``.
    """

    sequences: Sequences  # [D]
    sources: Tensor  # [D] int64, row of ``Sequences.concat([chosen, rejected])`` of the pairs
    chosen: Tensor  # [N] int64, row of ``sequences``
    rejected: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def are_shared(self) -> bool:
        """Whether a completion is in several pairs."""
        return len(self) < 2 * len(self.chosen)

    def of_pairs(self, values: Tensor) -> PairValues:
        """The sides of each pair, of ``values`` ([D]); what flows back to a completion is the sum over its pairs."""
        chosen, rejected = (to_device(rows, values.device) for rows in (self.chosen, self.rejected))
        return PairValues(chosen=values[chosen], rejected=values[rejected])

    def of_each(self, values: Tensor, lengths: Tensor) -> Tensor:
        """[sum of the D completions' tokens]: of ``values`` of all chosen sides and then all rejected ones, one each.

        ``lengths``: [2N] int64, values of each side.
        """
        if not self.are_shared:
            return values
        rows = torch.split(values, lengths.tolist())
        return torch.cat([rows[source] for source in self.sources.tolist()])

    def weights(self, of_pairs: Tensor) -> Tensor:
        """[D] float64: for each completion the sum of the weights of the pairs that it is in ([N])."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for side in (self.chosen, self.rejected):
            total.index_add_(0, side, of_pairs.double())
        return total


def completions_of(pairs: Pairs) -> Completions:
    """The completions of some pairs, each once."""
    number = len(pairs)
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    if not isinstance(pairs, RolloutPairs):
        return sides_of(pairs)
    places: dict[int, int] = {}
    sources: list[int] = []
    found: list[int] = []
    for source, row in enumerate([*pairs.chosen_rows.tolist(), *pairs.rejected_rows.tolist()]):
        if row not in places:
            places[row] = len(sources)
            sources.append(source)
        found.append(places[row])
    chosen, rejected = torch.tensor(found, dtype=torch.int64).view(2, number)
    index = torch.tensor(sources, dtype=torch.int64)
    sequences = both if len(sources) == 2 * number else both.select(index)
    return Completions(sequences=sequences, sources=index, chosen=chosen, rejected=rejected)


def sides_of(pairs: Pairs) -> Completions:
    """Both sides of each pair, every one a completion of its own."""
    number = len(pairs)
    every = torch.arange(2 * number)
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    return Completions(sequences=both, sources=every, chosen=every[:number], rejected=every[number:])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairUnit:
    """Pairs of one prompt that share a forward pass."""

    pairs: Tensor  # [n] int64
    rows: Tensor  # [d] int64, their completions: rows of ``Completions.sequences``


def pair_units(pairs: Pairs, completions: Completions, limits: MicroBatchLimits) -> list[PairUnit]:
    """The pairs of each prompt, in as few units as the limits of a pass allow; in order of first appearance.

    A pair is a unit of its own if nothing says which pairs are of one prompt (pairs from a file).
    """
    sides = list(zip(completions.chosen.tolist(), completions.rejected.tolist(), strict=True))
    prompts = pairs.prompt_index.tolist() if isinstance(pairs, RolloutPairs) else list(range(len(pairs)))
    costs = _Costs(completions.sequences, limits)
    open_units: dict[int, list[_Unit]] = {}
    units: list[_Unit] = []
    for pair, (prompt, rows) in enumerate(zip(prompts, sides, strict=True)):
        of_prompt = open_units.setdefault(prompt, [])
        unit = next((unit for unit in of_prompt if costs.fit({*unit.rows, *rows})), None)
        if unit is None:
            unit = _Unit(pairs=[], rows=set())
            of_prompt.append(unit)
            units.append(unit)
        unit.pairs.append(pair)
        unit.rows |= {*rows}
    return [_finished(unit, sides) for unit in units]


@dataclass(kw_only=True, slots=True)
class _Unit:
    pairs: list[int]
    rows: set[int]


class _Costs:
    """Whether completions of one prompt fit into a pass."""

    def __init__(self, sequences: Sequences, limits: MicroBatchLimits) -> None:
        self._limits = limits
        self._lengths: list[int] = sequences.lengths.tolist()
        self._prompts: list[int] = sequences.prompt_lengths.tolist()

    def fit(self, rows: set[int]) -> bool:
        budget = self._limits.num_tokens
        if budget is None:
            return len(rows) <= self._limits.num_sequences
        total: int = sum(self._lengths[row] for row in rows)
        if self._limits.share_prompts:
            total -= (len(rows) - 1) * self._prompts[next(iter(rows))]
        return total <= budget


def _finished(unit: _Unit, sides: Sequence[tuple[int, int]]) -> PairUnit:
    """First the chosen completions, then the others: the order of ``completions_of``."""
    rows = dict.fromkeys([*(sides[pair][0] for pair in unit.pairs), *(sides[pair][1] for pair in unit.pairs)])
    return PairUnit(pairs=torch.tensor(unit.pairs), rows=torch.tensor(list(rows)))
