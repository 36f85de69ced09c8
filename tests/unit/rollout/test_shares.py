"""One batch over several engines gives what one engine gives."""

from __future__ import annotations

import pytest
import torch

from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.engine import Sampling
from rlxf.rollout.shares import join, split_evenly
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
    tensors = (rollouts.prompt_index, rollouts.sample_index, rollouts.engine_logps, rollouts.policy_version)
    return [rollouts.sequences.rows(), rollouts.prompts.texts, *(tensor.tolist() for tensor in tensors)]


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
