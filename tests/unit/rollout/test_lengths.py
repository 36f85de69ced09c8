"""What answers are expected to cost: by what the same prompt gave last, and the same after a resume."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlxf.core.errors import CheckpointError
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.lengths import FILE, SeenLengths
from tests.damage import empty, truncate
from tests.data_world import make_rollouts

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def prompts(rows: dict[int, int] | list[tuple[int, int]]) -> PromptBatch:
    """Prompts by row of the data, with their lengths."""
    pairs = list(rows.items()) if isinstance(rows, dict) else rows
    return PromptBatch(
        prompts=Tokens.from_rows([[7] * length for _, length in pairs]),
        row_ids=torch.tensor([row for row, _ in pairs], dtype=torch.int64),
        positions=torch.arange(len(pairs)),
        texts=("",) * len(pairs),
        columns={},
    )


def sampled(answers: list[tuple[int, list[int]]]) -> Rollouts:
    """A step by row of the data and tokens of each completion; every prompt has 2 tokens."""
    batch = prompts([(row, 2) for row, _ in answers])
    return make_rollouts(batch, [[[5] * tokens for tokens in lengths] for _, lengths in answers])


def test_a_prompt_is_expected_to_give_what_it_gave_last() -> None:
    """Row 4 gave 10 and 20, then 6 and 8: 7 each. Of row 9, which is new, the mean of all: (1 + 3 + 6 + 8) / 4."""
    seen = SeenLengths()
    seen.add(sampled([(4, [10, 20]), (1, [1, 3])]))
    seen.add(sampled([(4, [6, 8])]))
    assert seen.work(prompts({4: 5, 1: 5, 9: 100}), 3) == [5 + 3 * 7, 5 + 3 * 2, 100 + 3 * 4.5]


def test_while_nothing_is_known_an_answer_is_as_long_as_the_mean_prompt() -> None:
    seen = SeenLengths()
    assert seen.work(prompts({0: 10, 1: 30}), 2) == [10 + 2 * 20, 30 + 2 * 20]
    assert seen.work(prompts({}), 2) == []
    seen.add(sampled([]))
    assert seen.work(prompts({0: 10}), 2) == [30]


def test_a_prompt_that_comes_twice_in_a_step_counts_with_all_its_answers() -> None:
    seen = SeenLengths()
    seen.add(sampled([(3, [1, 2]), (3, [3, 6])]))
    assert seen.work(prompts([(3, 1), (3, 2), (8, 0)]), 1) == [1 + 3, 2 + 3, 3]


STEP = st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 50), min_size=1, max_size=3)), max_size=6)


@given(st.lists(STEP, min_size=1, max_size=6), st.data())
@EXAMPLES
def test_a_resumed_run_expects_exactly_what_the_undisturbed_one_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[tuple[int, list[int]]]], data: st.DataObject
) -> None:
    """Whatever is complete at the checkpoint, and whatever waits in it."""
    rollouts = [sampled(step) for step in steps]
    undisturbed = SeenLengths()
    for each in rollouts:
        undisturbed.add(each)
    complete = data.draw(st.integers(0, len(steps)))
    saved, folder = SeenLengths(), tmp_path_factory.mktemp("checkpoint")
    for each in rollouts[:complete]:
        saved.add(each)
    saved.save(folder)
    resumed, asked = SeenLengths.load(folder), prompts({row: row % 5 + 1 for row in range(14)})
    for each in rollouts[complete:]:
        resumed.add(each)
    assert resumed.work(asked, 3) == undisturbed.work(asked, 3)  # to the last bit
    both = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
    undisturbed.save(both[0])
    resumed.save(both[1])
    first, second = ([path.read_bytes() for path in place.iterdir()] for place in both)
    assert first == second


def test_a_file_holds_the_rows_that_were_seen_and_no_file_none(tmp_path: Path) -> None:
    SeenLengths().save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert SeenLengths.load(tmp_path).work(prompts({0: 4}), 1) == [8]
    seen = SeenLengths()
    seen.add(sampled([(1_000_000, [3, 4]), (7, [1])]))
    seen.save(tmp_path)
    assert {name: values.tolist() for name, values in load_file(tmp_path / FILE).items()} == {
        "rows": [7, 1_000_000],
        "tokens": [1, 7],
        "counts": [1, 2],
    }


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    seen = SeenLengths()
    seen.add(sampled([(1, [3, 4]), (7, [1])]))
    for damage in (truncate, empty):
        seen.save(tmp_path)
        damage(tmp_path / FILE)
        with pytest.raises(CheckpointError, match=r"lengths\.safetensors: the lengths of earlier completions cannot"):
            SeenLengths.load(tmp_path)
    good = {"rows": np.array([1, 7]), "tokens": np.array([7, 1]), "counts": np.array([2, 1])}
    for name, values in (("rows", [7, 1]), ("rows", [-1, 7]), ("rows", [1]), ("counts", [0, 1]), ("tokens", [[7, 1]])):
        save_file(good | {name: np.array(values)}, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=r"expected ascending rows.*copy the checkpoint again"):
            SeenLengths.load(tmp_path)
    del good["tokens"]
    save_file(good, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="'tokens'"):
        SeenLengths.load(tmp_path)


def test_a_million_prompts_cost_a_step_little() -> None:
    """A step's cost is that of its own prompts."""
    size, seen = 1_000_000, SeenLengths()
    batch = sampled([(row, [3, 5]) for row in range(0, size, size // 256)])
    seen.add(replace(batch, prompts=replace(batch.prompts, row_ids=size - 1 - batch.prompts.row_ids)))
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        seen.add(batch)
        seen.work(batch.prompts, 2)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.01  # 1 ms on a quiet core
