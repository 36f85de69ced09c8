"""How evenly a step's sampling was spread, by hand-made steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.types import Rollouts
from rlxf.observe.tail import tail_metrics, tail_seconds
from tests.data_world import make_rollouts, prompt_batch


def step(lengths: list[list[int]], *, ended_s: list[float] | None = None, engine: list[int] | None = None) -> Rollouts:
    made = make_rollouts(prompt_batch([[1]] * len(lengths)), [[[5] * count for count in row] for row in lengths])
    return replace(
        made,
        ended_s=None if ended_s is None else torch.tensor(ended_s),
        engine=None if engine is None else torch.tensor(engine),
    )


def test_a_step_of_two_engines() -> None:
    """Lengths 2, 4, 6, 12, the last two on the second engine: 6 and 18 tokens. Less than two of four from 6 to 12 s."""
    done = step([[2, 4], [6, 12]], ended_s=[2, 4, 6, 12], engine=[0, 0, 1, 1])
    assert tail_metrics(done, num_engines=2, num_slots=8) == {
        "rollout/tail_s": 6.0,
        "rollout/longest_over_mean": 2.0,
        "rollout/imbalance": 1.5,
    }


def test_engines_without_a_completion_count() -> None:
    done = step([[3], [3]], engine=[0, 2])
    assert tail_metrics(done, num_engines=4, num_slots=8)["rollout/imbalance"] == 2.0


def test_one_engine_is_even_and_what_is_not_measured_is_left_out() -> None:
    assert tail_metrics(step([[1, 3]]), num_engines=1, num_slots=8) == {
        "rollout/longest_over_mean": 1.5,
        "rollout/imbalance": 1.0,
    }
    assert tail_metrics(step([[1, 3]]), num_engines=4, num_slots=8)["rollout/imbalance"] == 1.0
    assert tail_metrics(step([[0, 0]]), num_engines=1, num_slots=8)["rollout/longest_over_mean"] == 0.0
    assert tail_metrics(step([]), num_engines=2, num_slots=8) == {}


@pytest.mark.parametrize(
    ("ended_s", "engine", "slots", "expected"),
    [
        ([5], [0], 4, 0),  # one slot, busy to the end
        ([5, 5, 5, 5], [0, 0, 0, 0], 4, 0),
        ([1, 5], [0, 0], 4, 0),  # one of two is half
        ([1, 2, 5], [0, 0, 0], 4, 3),  # one of three from 2 on
        ([1, 2, 3, 9], [0, 0, 0, 0], 4, 6),  # one of four from 3 on
        ([1, 2, 3, 9], [0, 0, 0, 0], 2, 0),  # of two slots one is busy from 3 on: half
        ([1, 2, 3, 4, 9], [0, 0, 0, 0, 0], 3, 5),  # three until 3, two, then one of three from 4 on
        ([9, 2, 1, 3], [1, 0, 0, 0], 1, 0),  # two slots: the first engine's until 3, the second's until 9
        ([4, 4, 4, 10], [0, 1, 2, 3], 1, 6),  # three engines end at 4
    ],
)
def test_the_tail_begins_when_less_than_half_of_the_slots_are_busy(
    ended_s: list[float], engine: list[int], slots: int, expected: float
) -> None:
    assert tail_seconds(torch.tensor(ended_s), torch.tensor(engine), slots) == expected


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=25),
    st.integers(1, 8),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_tail_is_what_a_count_second_by_second_gives(ends: list[tuple[int, int]], slots: int) -> None:
    engines = {engine for _, engine in ends}

    def busy(second: int) -> int:
        left = [sum(end > second and of == engine for end, of in ends) for engine in engines]
        return sum(min(slots, each) for each in left)

    used = sum(min(slots, sum(of == engine for _, of in ends)) for engine in engines)
    counted = sum(busy(second) < used / 2 for second in range(max(end for end, _ in ends)))
    found = tail_seconds(torch.tensor([float(end) for end, _ in ends]), torch.tensor([of for _, of in ends]), slots)
    assert found == counted
