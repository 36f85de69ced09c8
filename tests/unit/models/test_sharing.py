"""Completions that several pairs share: each is there once, and units keep the pairs of a prompt together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.types import OnlinePairs, Pairs, Sequences
from rlxf.models.batching import MicroBatchLimits, pair_groups
from rlxf.models.sharing import completions_of, pair_units
from tests.pair_world import as_strangers, paired
from tests.settings import random_pairs


def test_each_completion_is_there_once_and_every_pair_finds_its_sides() -> None:
    pairs = paired(3, 4).pairs
    found = completions_of(pairs)
    assert len(pairs) == 18
    assert len(found) == 12
    assert found.are_shared
    for side, rows in ((pairs.chosen, found.chosen), (pairs.rejected, found.rejected)):
        assert found.sequences.select(rows).rows() == side.rows()
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    assert both.select(found.sources).rows() == found.sequences.rows()


def test_values_are_read_for_each_pair_and_gradients_add_up() -> None:
    found = completions_of(paired(1, 3).pairs)
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sides = found.of_pairs(values)
    (10 * sides.chosen.sum() + sides.rejected.sum()).backward()
    assert values.grad is not None
    chosen, rejected = (side.bincount(minlength=3) for side in (found.chosen, found.rejected))
    assert values.grad.tolist() == (10 * chosen + rejected).tolist()
    assert found.weights(torch.tensor([1.0, 1.0, 1.0])).tolist() == (chosen + rejected).tolist() == [2.0, 2.0, 2.0]


def test_values_of_tokens_are_read_once_for_each_completion() -> None:
    pairs = paired(2, 4).pairs
    assert isinstance(pairs, OnlinePairs)
    found = completions_of(pairs)
    lengths = torch.cat([pairs.chosen.completion_lengths, pairs.rejected.completion_lengths])
    engine = torch.split(found.of_each(pairs.all_engine_logps(), lengths), found.sequences.completion_lengths.tolist())
    for row, logps in zip(found.chosen.tolist(), pairs.chosen_engine_logps.split(lengths[:12].tolist()), strict=True):
        assert torch.equal(engine[row], logps)


@pytest.mark.parametrize("pairs", [random_pairs(5), as_strangers(paired(2, 3)).pairs, paired(4, 3, "best_worst").pairs])
def test_without_shared_completions_everything_is_as_it_was(pairs: Pairs) -> None:
    """All chosen, then all rejected; each pair for itself."""
    found = completions_of(pairs)
    assert found.sequences.rows() == [*pairs.chosen.rows(), *pairs.rejected.rows()]
    units = pair_units(pairs, found, MicroBatchLimits(num_sequences=8))
    assert [unit.pairs.tolist() for unit in units] == [[row] for row in range(len(pairs))]
    assert [unit.rows.tolist() for unit in units] == [group.tolist() for group in pair_groups(len(pairs))]


def test_the_pairs_of_a_prompt_are_one_unit_where_a_pass_takes_its_completions() -> None:
    pairs = paired(3, 4).pairs.select(torch.randperm(18, generator=torch.Generator().manual_seed(0)))
    assert isinstance(pairs, OnlinePairs)
    units = pair_units(pairs, completions_of(pairs), MicroBatchLimits(num_sequences=4))
    assert [set(pairs.prompt_index[unit.pairs].tolist()) for unit in units] == [
        {prompt} for prompt in dict.fromkeys(pairs.prompt_index.tolist())
    ]


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(2, 6),
    sequences=st.integers(1, 7),
    budget=st.sampled_from([None, 20, 60, 100]),
    share=st.booleans(),
    data=st.data(),
)
def test_units_hold_every_pair_once_and_fit_into_a_pass(
    samples: int, sequences: int, budget: int | None, share: bool, data: st.DataObject
) -> None:
    every = paired(3, samples).pairs
    rows = data.draw(st.permutations(range(len(every))))
    pairs = every.select(torch.tensor(rows[: data.draw(st.integers(1, len(every)))]))
    limits = MicroBatchLimits(num_sequences=sequences, num_tokens=budget, share_prompts=share)
    found = completions_of(pairs)
    units = pair_units(pairs, found, limits)
    assert sorted(pair for unit in units for pair in unit.pairs.tolist()) == list(range(len(pairs)))
    for unit in units:
        sides = [*found.chosen[unit.pairs].tolist(), *found.rejected[unit.pairs].tolist()]
        assert list(dict.fromkeys(sides)) == unit.rows.tolist()
        part = found.sequences.select(unit.rows)
        assert len({tuple(prompt) for prompt in part.prompt_rows()}) == 1
        shared = (len(part) - 1) * int(part.prompt_lengths[0]) if share else 0
        fits = len(part) <= sequences if budget is None else int(part.lengths.sum()) - shared <= budget
        assert fits or len(unit.pairs) == 1
