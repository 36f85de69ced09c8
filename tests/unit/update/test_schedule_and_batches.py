"""Learning rates of driver steps, and which pairs go where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlxf.update.batches import mini_batches
from rlxf.update.schedule import Schedule, make_schedule
from tests.settings import run_config


def test_cosine_starts_at_the_peak_after_warm_up_and_ends_at_the_floor() -> None:
    schedule = Schedule(style="cosine", lr=1.0, min_lr=0.1, warmup_steps=4, num_steps=104)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert schedule(4) == pytest.approx(1.0)
    assert schedule(54) == pytest.approx(0.55)
    assert schedule(104) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    linear = Schedule(style="linear", lr=1.0, min_lr=0.0, warmup_steps=0, num_steps=10)
    assert [linear(0), linear(5), linear(10), linear(99)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert Schedule(style="constant", lr=0.3, min_lr=0.0, warmup_steps=0, num_steps=10)(7) == 0.3


def test_warm_up_fraction_counts_as_share_of_all_steps(tmp_path: Path) -> None:
    config = run_config(tmp_path, lr_warmup_fraction=0.25).actor_rollout
    assert make_schedule(config, 40).warmup_steps == 10


def test_the_order_depends_on_seed_step_and_pass() -> None:
    def order(key: tuple[int, int, int]) -> list[int]:
        return torch.cat(mini_batches(50, 7, shuffle_key=key)).tolist()

    assert order((1, 2, 0)) == order((1, 2, 0))
    assert len({tuple(order(key)) for key in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0))}) == 4
