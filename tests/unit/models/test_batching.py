"""Which pairs share a forward pass, on which rank: each once, balanced by tokens, within the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.types import Sequences
from rlxf.models.batching import MicroBatchLimits, my_batches, pair_groups, shared_prompt_groups

Lengths = list[tuple[int, int, int]]  # prompt, chosen, rejected
LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=20)


def sequences_of(lengths: Lengths) -> Sequences:
    """Both sides of pairs with prompts that differ from each other."""
    prompts = [[10 + row] * prompt for row, (prompt, _, _) in enumerate(lengths)]
    sides = [[[5] * row[side] for row in lengths] for side in (1, 2)]
    return Sequences.concat([Sequences.from_rows(prompts, side) for side in sides])


def taken(lengths: Lengths, limits: MicroBatchLimits, dp_size: int) -> list[list[list[int]]]:
    sequences = sequences_of(lengths)
    groups = pair_groups(len(lengths))
    return [my_batches(sequences, groups, limits, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


def cost(row: tuple[int, int, int]) -> int:
    return sum(row)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, dp_size=st.integers(1, 5), budget=st.none() | st.integers(1, 200))
def test_every_pair_is_counted_once_whatever_the_sizes(lengths: Lengths, dp_size: int, budget: int | None) -> None:
    limits = MicroBatchLimits(num_sequences=4, num_tokens=budget)
    ranks = taken(lengths, limits, dp_size)
    assert sorted(pair for rank in ranks for batch in rank for pair in batch) == list(range(len(lengths)))
    for batch in (batch for rank in ranks for batch in rank):
        assert batch
        if budget is None:
            assert len(batch) <= 2
        else:
            assert len(batch) == 1 or sum(cost(lengths[pair]) for pair in batch) <= budget


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, dp_size=st.integers(2, 5))
def test_ranks_differ_by_no_more_tokens_than_the_longest_pair_has(lengths: Lengths, dp_size: int) -> None:
    ranks = taken(lengths, MicroBatchLimits(num_sequences=2), dp_size)
    loads = [sum(cost(lengths[pair]) for batch in rank for pair in batch) for rank in ranks]
    assert max(loads) - min(loads) <= max(map(cost, lengths))


def test_one_rank_without_a_budget_keeps_the_order() -> None:
    (batches,) = taken([(3, 9, 1), (3, 1, 1), (3, 30, 30)], MicroBatchLimits(num_sequences=4), 1)
    assert batches == [[0, 1], [2]]


def test_a_budget_fills_passes_that_a_fixed_number_of_pairs_leaves_empty() -> None:
    lengths = [(10, 80, 80), *[(10, 5, 5)] * 8]
    (fixed,) = taken(lengths, MicroBatchLimits(num_sequences=4), 1)
    (filled,) = taken(lengths, MicroBatchLimits(num_sequences=4, num_tokens=170), 1)
    assert (len(fixed), len(filled)) == (5, 2)


def test_a_shared_prompt_costs_once() -> None:
    lengths = [(10, 5, 5)] * 2
    (shared,) = taken(lengths, MicroBatchLimits(num_sequences=2, num_tokens=40), 1)
    (twice,) = taken(lengths, MicroBatchLimits(num_sequences=2, num_tokens=40, share_prompts=False), 1)
    assert (len(shared), len(twice)) == (1, 2)


@pytest.mark.parametrize("num_sequences", [2, 4, 6])
def test_completions_of_a_prompt_stay_together_as_far_as_a_pass_takes_them(num_sequences: int) -> None:
    prompts = [[1, 2], [3], [1, 2], [1, 2], [3], [1, 2]]
    groups = shared_prompt_groups(
        Sequences.from_rows(prompts, [[9]] * 6), MicroBatchLimits(num_sequences=num_sequences)
    )
    assert sorted(torch.cat(groups).tolist()) == list(range(6))
    for group in groups:
        assert len({tuple(prompts[row]) for row in group.tolist()}) == 1
        assert len(group) <= num_sequences
    assert len(groups) == {2: 3, 4: 2, 6: 2}[num_sequences]
