"""Where a chunk's completions are in its step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlxf.algorithms.scoring import CompletionRows
from tests.pair_world import random_scored


@pytest.mark.parametrize("prompts", [(2, 0), (1,), (3, 1, 0, 2), ()], ids=str)
def test_rows_of_prompts_are_found_in_a_step_of_any_order(prompts: tuple[int, ...]) -> None:
    rollouts = random_scored(4, 3).rollouts
    index = torch.tensor([2, 0, 1, 3, 0, 0, 2, 3, 1, 1, 3, 2])
    found = CompletionRows(replace(rollouts, prompt_index=index)).of(prompts)
    assert found.tolist() == [row for prompt in prompts for row in (index == prompt).nonzero().flatten().tolist()]
