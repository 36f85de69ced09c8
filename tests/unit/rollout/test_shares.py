"""One batch over several engines gives what one engine gives, whatever part of it each engine samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import ShapeError
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.engine import Sampling
from rlxf.rollout.shares import join, one_after_the_other, part_of, split_evenly
from tests.unit.small_run import SmallEngine

SAMPLING = Sampling(num_samples=3, max_new_tokens=6, seed=5)


def prompts(count: int) -> PromptBatch:
    return PromptBatch(
        prompts=Tokens.from_rows([[2] * (1 + i % 3) for i in range(count)]),
        row_ids=torch.arange(100, 100 + count),
        positions=torch.arange(100, 100 + count),
        texts=tuple(str(i) for i in range(count)),
        columns={"answer": list(range(count))},
    )


def fields(rollouts: Rollouts) -> list[object]:
    found = rollouts.prompts
    tensors = (
        *(found.prompts.tokens, found.prompts.lengths, found.row_ids, found.positions),
        *(rollouts.prompt_index, rollouts.sample_index, rollouts.engine_logps, rollouts.policy_version),
        *(rollouts.sequences.tokens, rollouts.sequences.lengths, rollouts.sequences.prompt_lengths),
        *(values for values in (rollouts.ended_s, rollouts.engine) if values is not None),
    )
    return [found.texts, found.columns, *((str(tensor.dtype), tensor.tolist()) for tensor in tensors)]


def measured(rollouts: Rollouts, engine: int = 0) -> Rollouts:
    """With moments that tell the completions apart, and the engine's number."""
    ended = rollouts.engine_logps.new_tensor([sum(row) for row in rollouts.sequences.rows()])
    return replace(rollouts, ended_s=ended, engine=torch.full((len(rollouts),), engine))


def by_hand(whole: Rollouts, rows: Sequence[int]) -> Rollouts:
    """``part_of``, row by row."""
    logps = torch.split(whole.engine_logps, whole.sequences.completion_lengths.tolist())
    picked = [(new, i) for new, row in enumerate(rows) for i in range(len(whole)) if int(whole.prompt_index[i]) == row]
    index = torch.tensor([i for _, i in picked], dtype=torch.int64)
    return Rollouts(
        prompts=whole.prompts.select(rows),
        sequences=whole.sequences.select(index),
        prompt_index=torch.tensor([new for new, _ in picked], dtype=torch.int64),
        sample_index=whole.sample_index[index],
        engine_logps=torch.cat([whole.engine_logps[:0], *(logps[i] for _, i in picked)]),
        policy_version=whole.policy_version[index],
        ended_s=None if whole.ended_s is None else whole.ended_s[index],
        engine=None if whole.engine is None else whole.engine[index],
    )


@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_another_number_of_engines_draws_the_same_samples(engines: int) -> None:
    batch = prompts(7)
    whole = SmallEngine([]).generate(batch, SAMPLING)
    parts = [SmallEngine([]).generate(share, SAMPLING) for share in split_evenly(batch, engines)]
    assert fields(join(batch, parts)) == fields(whole)


@pytest.mark.parametrize(("count", "parts", "sizes"), [(7, 3, [2, 2, 3]), (2, 4, [1, 1]), (8, 2, [4, 4])])
def test_shares_are_contiguous_and_even(count: int, parts: int, sizes: list[int]) -> None:
    shares = split_evenly(prompts(count), parts)
    assert [len(share) for share in shares] == sizes
    assert [text for share in shares for text in share.texts] == [str(i) for i in range(count)]
    assert [value for share in shares for value in share.columns["answer"]] == list(range(count))


@given(st.integers(1, 9), st.integers(1, 5), st.randoms())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_parts_may_hold_any_prompts_in_any_order(count: int, engines: int, draw: random.Random) -> None:
    batch = prompts(count)
    whole = measured(SmallEngine([]).generate(batch, SAMPLING))
    rows = draw.sample(range(count), count)
    parts = [SmallEngine([]).generate(batch.select(rows[i::engines]), SAMPLING) for i in range(engines)]
    assert fields(join(batch, [measured(part) for part in parts])) == fields(whole)
    assert fields(part_of(whole, rows)) == fields(by_hand(whole, rows))
    assert fields(part_of(whole, rows[::2])) == fields(by_hand(whole, rows[::2]))
    chunks = [part_of(whole, rows[i : i + 2]) for i in range(0, count, 2)]
    assert fields(join(batch, chunks)) == fields(whole)


def test_who_sampled_what_and_when_goes_along_if_all_parts_know_it() -> None:
    batch = prompts(3)
    first, second = (SmallEngine([]).generate(batch.select(rows), SAMPLING) for rows in ([2, 0], [1]))
    joined = join(batch, [measured(first, 1), measured(second, 4)])
    assert joined.engine is not None
    assert joined.ended_s is not None
    assert joined.engine.tolist() == [1, 1, 1, 4, 4, 4, 1, 1, 1]
    assert joined.ended_s.tolist() == [sum(row) for row in joined.sequences.rows()]
    for lacking in (join(batch, [measured(first, 1), second]), join(batch, [first, second])):
        assert lacking.engine is None
        assert lacking.ended_s is None


def test_completions_of_a_prompt_are_in_the_order_of_samples() -> None:
    """An engine may give them as they ended."""
    batch = prompts(2)
    whole = SmallEngine([]).generate(batch, SAMPLING)
    order = torch.tensor([4, 0, 2, 5, 3, 1])
    logps = torch.split(whole.engine_logps, whole.sequences.completion_lengths.tolist())
    mixed = replace(
        whole,
        sequences=whole.sequences.select(order),
        engine_logps=torch.cat([logps[i] for i in order.tolist()]),
        **{name: getattr(whole, name)[order] for name in ("prompt_index", "sample_index", "policy_version")},
    )
    assert fields(join(batch, [mixed])) == fields(whole)
    assert fields(part_of(mixed, [0, 1])) == fields(whole)


def test_the_whole_step_is_a_part_of_itself() -> None:
    whole = SmallEngine([]).generate(prompts(4), SAMPLING)
    assert fields(part_of(whole, range(4))) == fields(whole)
    assert len(part_of(whole, [])) == 0


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 9), cut=st.integers(1, 8), draw=st.randoms())
def test_two_parts_one_after_the_other_are_the_part_of_both(count: int, cut: int, draw: random.Random) -> None:
    whole = measured(SmallEngine([]).generate(prompts(count), SAMPLING))
    order = draw.sample(range(count), count)
    parts = [part_of(whole, rows) for rows in (order[:cut], order[cut:]) if rows]
    assert fields(one_after_the_other(parts)) == fields(part_of(whole, order))


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2], [3]], [[0], [1], [1]]])
def test_parts_that_are_not_the_step_are_refused(rows: list[list[int]]) -> None:
    more = prompts(4)
    parts = [SmallEngine([]).generate(more.select(each), SAMPLING) for each in rows]
    with pytest.raises(ShapeError, match="expected the completions of 3 prompts at positions of their own"):
        join(more.slice(0, 3), parts)


def test_prompts_at_the_same_position_are_refused() -> None:
    batch = replace(prompts(3), positions=torch.tensor([5, 6, 5]))
    with pytest.raises(ShapeError, match="3 prompts at 2 of 2 positions"):
        join(batch, [SmallEngine([]).generate(batch, SAMPLING)])
