"""What the driver puts off: done beside an update or a sampling, before a checkpoint, and whatever ends the run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rlxf import driver
from rlxf.core.errors import DiskError, TrainingError
from rlxf.core.pairs import PairingResult
from rlxf.core.stop import Stop
from rlxf.core.types import ReferenceRecord, ScoredRollouts
from rlxf.driver import train
from rlxf.loop.later import Later
from rlxf.schedule import InThreads, Lookahead, Stage
from tests.unit.small_run import SmallRun, small_config, small_run


@dataclass
class Item:
    step: int
    sampled: bool = False


def schedule(meanwhile: Callable[[], None], sample: Callable[[Item], None]) -> Lookahead[Item]:
    def work(item: Item) -> None:
        sample(item)
        item.sampled = True

    gen: Stage[Item] = Stage(name="gen", lane="infer", is_done=lambda item: item.sampled, work=work)
    return Lookahead(
        [gen], InThreads(Stop()), lambda step, boundary: Item(step),
        num_ahead=0, num_steps=6, steps=deque(), meanwhile=meanwhile,
    )  # fmt: skip


def test_it_is_done_while_the_engines_sample() -> None:
    done = threading.Event()

    def sample(_: Item) -> None:
        assert done.wait(10)  # else nothing of it is beside the sampling

    assert schedule(done.set, sample).take(0).sampled


def test_what_fails_beside_an_update_does_not_cut_it() -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise DiskError("full")

    def update() -> str:
        assert failed.wait(10)
        return "updated"

    ahead = schedule(fail, lambda item: None)
    assert ahead.beside("train", update) == "updated"
    with pytest.raises(DiskError, match="full"):
        ahead.sampled()


def test_it_keeps_its_order_and_goes_on_behind_what_fails() -> None:
    done: list[int] = []
    later = Later(at_once=False)

    def fail() -> None:
        raise DiskError("full")

    later.add(lambda: done.append(1))
    later.add(fail)
    later.add(lambda: done.append(2))
    assert done == []
    with pytest.raises(DiskError):
        later.do()
    later.do()
    assert done == [1, 2]
    Later().add(lambda: done.append(3))  # at once
    assert done == [1, 2, 3]


def threaded(**changes: object) -> SmallRun:
    return small_run(small_config(**changes), lanes=InThreads)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_step_is_recorded_beside_its_update(lookahead: int) -> None:
    small, recorded = threaded(rollout__lookahead=lookahead), threading.Event()
    write = small.recorder.write

    def note(step: int, scored: ScoredRollouts, pairing: PairingResult, reference: ReferenceRecord) -> None:
        write(step, scored, pairing, reference)
        recorded.set()

    def during_update() -> None:
        assert recorded.wait(10)
        recorded.clear()

    small.recorder.write, small.actor.during_update = note, during_update  # type: ignore[method-assign]
    train(small.run)
    assert small.recorder.steps == [1, 2, 3, 4]


@pytest.fixture
def no_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver never has time while it waits."""

    def busy(*args: Any, meanwhile: Callable[[], None], **options: Any) -> Any:
        return Lookahead(*args, **options)

    monkeypatch.setattr(driver, "Lookahead", busy)


@pytest.mark.usefixtures("no_meanwhile")
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_checkpoint_finds_the_rows_of_its_steps(lookahead: int) -> None:
    small, found = threaded(rollout__lookahead=lookahead, training__save_interval=2), list[list[int]]()
    small.folder.during_save = lambda: found.append(list(small.recorder.steps))
    train(small.run)
    assert found == [[1, 2], [1, 2, 3, 4]]


@pytest.mark.usefixtures("no_meanwhile")
def test_the_end_of_a_run_finds_all_rows() -> None:
    small = threaded()
    small.run.report.finished = lambda policy: seen.extend(small.recorder.steps)  # type: ignore[method-assign]
    seen: list[int] = []
    train(small.run)
    assert seen == [1, 2, 3, 4]


@pytest.mark.usefixtures("no_meanwhile")
def test_rows_of_a_step_whose_update_fails_are_there_to_be_looked_at() -> None:
    small = threaded()

    def during_update() -> None:
        raise TrainingError("the loss is nan")

    small.actor.during_update = during_update
    with pytest.raises(TrainingError, match="the loss is nan"):
        train(small.run)
    assert small.recorder.steps == [1]


@pytest.mark.usefixtures("no_meanwhile")
def test_rows_that_cannot_be_written_at_the_end_do_not_hide_why_the_run_ended() -> None:
    small = threaded()

    def write(step: int, scored: ScoredRollouts, pairing: PairingResult, reference: ReferenceRecord) -> None:
        raise DiskError("full")

    def during_update() -> None:
        raise TrainingError("the loss is nan")

    small.recorder.write, small.actor.during_update = write, during_update  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss is nan"):
        train(small.run)
