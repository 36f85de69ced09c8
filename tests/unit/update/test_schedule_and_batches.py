"""Learning rates of driver steps, and which pairs go where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from rlxf.update.batches import mini_batches
from rlxf.update.schedule import Schedule, make_schedule
from tests.settings import run_config


def rates(style: Literal["constant", "linear", "cosine"], warmup: int, steps: int) -> list[float]:
    """Of every step that a run of ``steps`` steps has, with a peak of 1 and a floor of 0.1."""
    schedule = Schedule(style=style, lr=1.0, min_lr=0.1, warmup_steps=warmup, num_steps=steps)
    return [schedule(step) for step in range(steps)]


def test_cosine_starts_at_the_peak_after_warm_up_and_ends_at_the_floor() -> None:
    found = rates("cosine", 4, 105)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[54] == pytest.approx(0.55)
    assert found[104] == 0.1
    assert found[4:] == sorted(found[4:], reverse=True)


def test_linear_goes_down_by_equal_parts_and_constant_stays() -> None:
    assert rates("linear", 0, 10) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates("constant", 2, 5) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("style", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 2), (0, 80), (1, 2), (15, 80), (78, 80), (79, 80)])
def test_the_last_step_of_a_run_has_exactly_the_smallest_rate(
    style: Literal["linear", "cosine"], warmup: int, steps: int
) -> None:
    found = rates(style, warmup, steps)
    assert found[-1] == 0.1
    assert max(found) == 1.0


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_run_without_a_step_after_the_peak_does_not_decay(style: Literal["linear", "cosine"]) -> None:
    assert rates(style, 4, 4) == [0.25, 0.5, 0.75, 1.0]  # the warm-up is all there is
    assert rates(style, 8, 4) == [0.125, 0.25, 0.375, 0.5]
    assert rates(style, 0, 1) == rates(style, 1, 1) == [1.0]  # a step at min_lr = 0 would train nothing


def test_a_run_that_goes_on_for_longer_ends_at_the_smallest_rate_again() -> None:
    assert rates("linear", 0, 6)[5] == 0.1
    assert rates("linear", 0, 11)[5:] == pytest.approx([0.55, 0.46, 0.37, 0.28, 0.19, 0.1])


def test_warm_up_fraction_counts_as_share_of_all_steps(tmp_path: Path) -> None:
    config = run_config(tmp_path, lr_warmup_fraction=0.25).actor_rollout
    assert make_schedule(config, 40).warmup_steps == 10


def test_the_order_depends_on_seed_step_and_pass() -> None:
    def order(key: tuple[int, int, int]) -> list[int]:
        return torch.cat(mini_batches(50, 7, shuffle_key=key)).tolist()

    assert order((1, 2, 0)) == order((1, 2, 0))
    assert len({tuple(order(key)) for key in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0))}) == 4
