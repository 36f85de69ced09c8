"""Which sequences share a forward pass, and on which data-parallel rank. Pure; indivisible numbers are no error.

Sequences that must stay together (the two sides of a pair, the completions of a prompt) form a *unit*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlxf.config.roles import MicroBatchConfig
from rlxf.core.types import Sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchLimits:
    """How much one forward pass takes."""

    num_sequences: int  # at most, as long as there is no token budget
    num_tokens: int | None = None  # token budget, in place of ``num_sequences``
    share_prompts: bool = True  # compute a prompt once for all sequences of the pass that have it
    fixed_length: bool = False  # fill every pass up to the token budget with padding

    @classmethod
    def of(cls, config: MicroBatchConfig, *, fixed_length: bool = False) -> MicroBatchLimits:
        """The limits in a role's section; ``fixed_length``: its pipeline passes need tensors of one size."""
        return cls(
            num_sequences=2 * config.micro_batch_size,
            num_tokens=config.max_tokens_per_micro_batch,
            share_prompts=config.share_prompts,
            fixed_length=fixed_length,
        )

    @property
    def length(self) -> int | None:
        """Tokens of every pass; None: as many as its sequences have."""
        return self.num_tokens if self.fixed_length else None


def prompt_groups(sequences: Sequences) -> list[list[int]]:
    """Rows with the same prompt, in order of first appearance."""
    tokens = sequences.tokens.numpy()
    starts = (sequences.lengths.cumsum(0) - sequences.lengths).tolist()
    found: dict[bytes, list[int]] = {}
    for row, (start, length) in enumerate(zip(starts, sequences.prompt_lengths.tolist(), strict=True)):
        found.setdefault(tokens[start : start + length].tobytes(), []).append(row)
    return list(found.values())


def shared_prompt_groups(sequences: Sequences, limits: MicroBatchLimits) -> list[Tensor]:
    """Units of rows with the same prompt, none of more sequences than a pass takes."""
    rows = [torch.tensor(group) for group in prompt_groups(sequences)]
    return [piece for group in rows for piece in torch.split(group, limits.num_sequences)]


def pair_groups(num_pairs: int) -> list[Tensor]:
    """Units of ``Sequences.concat([chosen, rejected])``: row ``i`` and row ``num_pairs + i``."""
    return [torch.tensor([row, row + num_pairs]) for row in range(num_pairs)]


def my_batches(
    sequences: Sequences, groups: Sequence[Tensor], limits: MicroBatchLimits, *, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """The forward passes of one data-parallel rank: for each, which ``units`` it takes. Empty if others take them all.

    Every unit is taken by exactly one rank. The ranks' numbers of tokens are as equal as a greedy choice makes them.
    """
    costs = _costs(sequences, groups, limits)
    mine = _balanced(costs, dp_size)[dp_rank]
    if limits.num_tokens is not None:
        return _first_fit(mine, costs, limits.num_tokens)
    return _in_order(mine, [len(group) for group in groups], limits.num_sequences)


def _costs(sequences: Sequences, groups: Sequence[Tensor], limits: MicroBatchLimits) -> list[int]:
    """Tokens that a pass computes for each unit. A completion's last token predicts nothing and is not fed."""
    lengths, prompts = sequences.lengths.tolist(), sequences.prompt_lengths.tolist()
    if not limits.share_prompts:
        return [sum(lengths[row] for row in group.tolist()) for group in groups]
    group_of = {row: number for number, group in enumerate(prompt_groups(sequences)) for row in group}
    costs = []
    for group in groups:
        rows = group.tolist()
        distinct = {group_of[row]: prompts[row] for row in rows}
        costs.append(sum(distinct.values()) + sum(lengths[row] - prompts[row] for row in rows))
    return costs


def _balanced(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items for each rank, longest first to the rank with the least so far; in their first order within a rank."""
    if num_ranks == 1:
        return [list(range(len(costs)))]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]


def _first_fit(items: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Passes of up to ``budget`` tokens, longest items first; an item above the budget has a pass for itself."""
    passes: list[list[int]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda i: -costs[i]):
        place = next((i for i, left in enumerate(room) if costs[item] <= left), None)
        if place is None:
            passes.append([])
            room.append(budget)
            place = len(passes) - 1
        passes[place].append(item)
        room[place] -= costs[item]
    return passes


def _in_order(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive items up to ``limit`` sequences; an item above the limit has a pass for itself."""
    passes: list[list[int]] = []
    size = 0
    for item in items:
        if not passes or size + sizes[item] > limit:
            passes.append([])
            size = 0
        passes[-1].append(item)
        size += sizes[item]
    return passes
