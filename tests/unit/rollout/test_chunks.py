"""Parts of a step in any order give the whole step, and each chunk as soon as its last prompt is there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import ShapeError
from rlxf.core.types import Rollouts
from rlxf.rollout.chunks import Gathered, chunks_of
from rlxf.rollout.shares import part_of
from tests.unit.rollout.test_shares import SAMPLING, fields, prompts
from tests.unit.small_engine import SmallEngine

K = SAMPLING.num_samples


def sampled(count: int) -> Rollouts:
    return SmallEngine([]).generate(prompts(count), SAMPLING)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 12), size=st.integers(1, 5), together=st.integers(1, 4), seed=st.integers(0, 99))
def test_chunks_and_the_whole_step_do_not_depend_on_what_comes_first(
    count: int, size: int, together: int, seed: int
) -> None:
    draw, whole = random.Random(seed), sampled(count)
    order = draw.sample(range(count), count)
    chunks = [tuple(order[first : first + size]) for first in range(0, count, size)]
    gathered = Gathered(whole.prompts, chunks, num_samples=K)
    arrival = draw.sample(range(count), count)
    found = {}
    for first in range(0, count, together):
        come = arrival[first : first + together]
        for chunk in gathered.add(part_of(whole, come)):
            assert set(chunk.rows) <= set(arrival[: first + together])
            found[chunk.rows] = chunk.rollouts
    assert fields(gathered.whole()) == fields(whole)
    assert {rows: fields(part) for rows, part in found.items()} == {
        chunk.rows: fields(chunk.rollouts) for chunk in chunks_of(whole, chunks)
    }
    assert set(found) == set(chunks)


def test_a_prompt_that_lacks_a_completion_is_refused() -> None:
    """Its pair would be made before its last sample."""
    part = part_of(sampled(3), [1])
    short = replace(
        part,
        sequences=part.sequences.select(torch.arange(K - 1)),
        prompt_index=part.prompt_index[: K - 1],
        sample_index=part.sample_index[: K - 1],
        engine_logps=part.engine_logps[: int(part.sequences.completion_lengths[: K - 1].sum())],
        policy_version=part.policy_version[: K - 1],
    )
    gathered = Gathered(prompts(3), [(0, 1, 2)], num_samples=K)
    with pytest.raises(ShapeError, match=r"position 101 came with 2 of its 3 completions"):
        gathered.add(short)


def test_a_prompt_that_comes_twice_is_refused() -> None:
    whole = sampled(2)
    gathered = Gathered(whole.prompts, [(0,), (1,)], num_samples=K)
    gathered.add(part_of(whole, [1]))
    with pytest.raises(ShapeError, match="position 101 was sampled twice"):
        gathered.add(whole)
