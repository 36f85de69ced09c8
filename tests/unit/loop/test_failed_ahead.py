"""How a run that looks ahead ends, and what its schedule does with steps that an earlier process left."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from threading import Event

import pytest
from torch import Tensor

from rlxf.core.errors import TrainingError
from rlxf.core.stop import Stop
from rlxf.core.types import Rollouts
from rlxf.driver import train
from rlxf.schedule import InThreads, Lookahead, OneAfterTheOther, Stage
from tests.unit.small_run import small_config, small_run


@dataclass(eq=False)
class Item:
    step: int
    sampled: bool = False


def test_a_step_that_an_earlier_process_left_is_waited_for_whatever_its_number() -> None:
    """Nothing may be pushed while the engines sample it."""
    begun = Event()

    def sample(item: Item) -> None:
        begun.set()
        time.sleep(0.1)
        item.sampled = True

    gen: Stage[Item] = Stage(name="gen", lane="infer", is_done=lambda item: item.sampled, work=sample)
    left = Item(5)
    schedule = Lookahead(
        [gen], InThreads(Stop()), lambda step, boundary: Item(step), num_ahead=1, num_steps=6, steps=deque([left])
    )
    assert schedule.unsampled() == [left]
    schedule.sampled()
    assert begun.is_set()
    assert left.sampled


class Closing(OneAfterTheOther):
    closed = False

    def close(self) -> None:
        self.closed = True


class Broken:
    def score(self, rollouts: Rollouts) -> Tensor:
        raise TrainingError("the service is down")


def test_a_run_that_fails_in_its_first_step_ends_what_is_under_way() -> None:
    lanes = Closing()
    small = small_run(small_config(rollout__lookahead=1), scorer=Broken(), lanes=lambda stop: lanes)
    with pytest.raises(TrainingError, match="the service is down"):
        train(small.run)
    assert lanes.closed
