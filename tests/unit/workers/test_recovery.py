"""A trainer that is lost, without a cluster: how often it is started again, from where, and what is told."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.core.clock import Clock
from rlxf.core.errors import RlxfError, RunInterrupted, StopRequested, WorkerLost, notes_of
from rlxf.core.events import NAME, recorded_events
from rlxf.core.stop import Stop
from workers import recovery as module
from workers.recovery import WINDOW_S, Recovery


@dataclass(frozen=True)
class Found:
    """A run as it was prepared."""

    config: Any
    resume: Any = None


class World:
    """A crew of two trainers and a reference; ``loading``: what happens while the new ones load, in turn."""

    def __init__(self, *, max_recoveries: int = 3) -> None:
        self.found = Found(SimpleNamespace(resilience=SimpleNamespace(max_recoveries=max_recoveries)))
        self.now = 0.0
        self.train = SimpleNamespace(members=("train 0", "train 1"))
        self.dead: list[int] = []
        self.started: list[list[int]] = []
        self.loading: list[Callable[[], None]] = []
        self.engines_told = 0
        self.stop = Stop()
        crew: Any = self
        engines: Any = self
        self.recovery = Recovery(crew, engines, Clock(), self.stop, now=lambda: self.now)

    @property
    def stateful(self) -> dict[str, Any]:
        return {"train": self.train}

    def gone(self, group: Any) -> list[int]:
        return self.dead

    def start_again(self, group: Any, ranks: Sequence[int], lost: WorkerLost, *, told: bool) -> list[str]:
        assert told
        self.started.append(list(ranks))
        self.dead = []
        return ["a call"]

    def wait_for_loading(self, calls: list[str]) -> None:
        self.now += 7.0
        if self.loading:
            self.loading.pop(0)()

    def forget(self, group: Any) -> None: ...

    def begin_again(self) -> None:
        self.engines_told += 1

    def lose(self, complete_steps: int | None = 5) -> RlxfError:
        self.dead = [1]
        error = WorkerLost("lost train rank 1 during update")
        error.stage, error.complete_steps = "update_actor", complete_steps
        return error


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The newest one is of step 4."""
    caplog.set_level(logging.INFO)
    resume = SimpleNamespace(state=SimpleNamespace(step=4), folder=Path("checkpoints/iter_0000004"))
    monkeypatch.setattr(module, "find_again", lambda found: resume)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def again(world: World, error: RlxfError) -> Any:
    found: Any = world.found
    return world.recovery.begin_again(found, error)


def test_all_trainers_start_again_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    world = World()
    with recorded_events(tmp_path):
        assert again(world, world.lose()).resume.state.step == 4
    assert (world.started, world.engines_told) == ([[0, 1]], 1)
    lost, rebuilt = rows(tmp_path)
    assert {key: lost[key] for key in ("event", "who", "phase", "step")} == {
        "event": "lost",
        "who": "train",
        "phase": "update_actor",
        "step": 6,
    }
    assert {key: rebuilt[key] for key in ("event", "seconds", "steps_lost")} == {
        "event": "rebuilt",
        "seconds": 7.0,
        "steps_lost": 1,
    }
    assert "goes on from iter_0000004, step 4: 1 complete steps" in rebuilt["message"]


def test_a_run_without_a_checkpoint_goes_on_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "find_again", lambda found: None)
    world = World()
    assert again(world, world.lose(3)).resume is None
    assert "goes on from the beginning: 3 complete steps are done again" in caplog.messages[-1]


def test_a_trainer_that_is_lost_before_the_first_step_of_a_resumed_run_costs_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    again(world, world.lose(None))
    assert "0 complete steps are done again" in caplog.messages[-1]


def test_more_than_so_many_in_an_hour_end_the_run(tmp_path: Path) -> None:
    world = World(max_recoveries=2)
    for _ in range(2):
        again(world, world.lose())
        world.now += 60.0
    error = world.lose()
    error.add_note("not saved: the actor is lost; the newest checkpoint is iter_0000004")
    with recorded_events(tmp_path), pytest.raises(RunInterrupted) as interrupted:
        again(world, error)
    assert str(interrupted.value) == (
        "lost train rank 1 during update\n"
        "the trainer was started again 2 times within an hour, which is resilience.max_recoveries = 2"
    )
    assert interrupted.value.exit_code == 75
    assert notes_of(interrupted.value) == notes_of(error)
    assert len(world.started) == 2
    assert [row["event"] for row in rows(tmp_path)] == ["lost"]


def test_those_of_more_than_an_hour_ago_do_not_count() -> None:
    world = World(max_recoveries=2)
    for _ in range(20):
        again(world, world.lose())
        world.now += WINDOW_S / 2
    assert len(world.started) == 20


def test_a_trainer_that_is_lost_while_it_loads_is_started_again_and_counted() -> None:
    world = World(max_recoveries=2)

    def lose() -> None:
        raise world.lose()

    world.loading = [lose]
    assert again(world, world.lose()).resume.state.step == 4
    assert len(world.started) == 2
    with pytest.raises(RunInterrupted, match="2 times within an hour"):
        again(world, world.lose())


def test_an_error_while_they_load_that_is_no_loss_ends_the_run() -> None:
    world = World()

    def fail() -> None:
        raise WorkerLost("an answer was lost, but every process lives")

    world.loading = [fail]
    with pytest.raises(WorkerLost, match="every process lives"):
        again(world, world.lose())


@pytest.mark.parametrize("why", ["no trainer is gone", "max_recoveries = 0", "the user stops the run"])
def test_what_is_not_to_be_recovered_is_the_error_that_it_was(why: str, caplog: pytest.LogCaptureFixture) -> None:
    world = World(max_recoveries=0 if why == "max_recoveries = 0" else 3)
    error = world.lose()
    if why == "no trainer is gone":
        world.dead = []
    if why == "the user stops the run":
        world.stop._signal = signal.SIGTERM
        # A signal to all processes of a job ends Ray's head, too, and asking it then never returns.
        world.gone = lambda group: pytest.fail("Ray was asked who is gone")  # type: ignore[method-assign]
    with pytest.raises(WorkerLost) as raised:
        again(world, error)
    assert raised.value is error
    assert world.started == []
    assert caplog.messages == []


def test_a_signal_ends_a_recovery() -> None:
    world = World()

    def stop() -> None:
        world.stop._signal = signal.SIGTERM
        world.stop.check()

    world.loading = [stop]
    with pytest.raises(StopRequested):
        again(world, world.lose())
    assert len(world.started) == 1
