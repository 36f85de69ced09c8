"""What a run shows of its schedule: idle pools, waits, and boxes of a trace."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.clock import Clock
from rlxf.driver import train
from rlxf.observe.trace import Trace
from rlxf.schedule import InThreads
from tests.traces import overlaps, read_boxes
from tests.unit.small_run import SmallRun, small_config, small_run

ROLES = ("train", "infer", "ref", "reward")
GEN_S, UPDATE_S = 0.1, 0.15  # long beside what a busy machine adds
NUM_STEPS = 4


def slowly(small: SmallRun) -> SmallRun:
    """The same run, whose sampling and update take a while."""
    small.engine.during_generate = lambda: time.sleep(GEN_S)
    small.actor.during_update = lambda: time.sleep(UPDATE_S)
    return small


def seen(lookahead: int, trace: Trace | None = None, **options: Any) -> SmallRun:
    """A whole run that measures its pools."""
    small = slowly(small_run(small_config(rollout__lookahead=lookahead, training__train_iters=NUM_STEPS), **options))
    lanes = InThreads(small.stop) if lookahead else small.run.lanes
    small = replace(small, run=replace(small.run, clock=Clock(ROLES, trace), lanes=lanes))
    train(small.run)
    return small


def test_without_lookahead_engines_and_trainer_wait_for_each_other() -> None:
    small = seen(0)
    for row in small.notes.steps.values():
        assert GEN_S <= row["pipeline/wait_rollout_s"] < row["timing/all"] - UPDATE_S
        assert UPDATE_S <= row["pipeline/wait_train_s"] < row["timing/all"] - GEN_S
        busy = 2 - row["timing/idle_train"] - row["timing/idle_infer"]
        assert 0.4 < busy < 1.1  # never together, but for the push
        assert row["timing/idle_reward"] > 0.5


def test_with_lookahead_the_engines_sample_while_the_trainer_updates() -> None:
    small = seen(1)
    rows = list(small.notes.steps.values())
    for row in rows[1:-1]:
        assert row["pipeline/wait_rollout_s"] < GEN_S  # its completions were there
        assert row["pipeline/wait_train_s"] < UPDATE_S  # the sampling took a part of the update
        assert 2 - row["timing/idle_train"] - row["timing/idle_infer"] > 1.15  # together
    assert rows[-1]["pipeline/wait_train_s"] == 0  # the last step has nothing beside it to sample
    assert rows[-1]["timing/idle_infer"] > 0.7


def test_rows_have_the_names_of_the_roles_and_shares(tmp_path: Path) -> None:
    names = {f"timing/idle_{role}" for role in ROLES} | {"pipeline/wait_rollout_s", "pipeline/wait_train_s"}
    for lookahead in (0, 1):
        for row in seen(lookahead).notes.steps.values():
            assert names <= set(row)
            assert all(0 <= row[f"timing/idle_{role}"] <= 1 for role in ROLES)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_trace_has_a_box_of_every_stage_with_its_step_and_version(tmp_path: Path, lookahead: int) -> None:
    trace = Trace(tmp_path / "trace.json", role_rows=True)
    seen(lookahead, trace)
    trace.close()
    boxes = read_boxes(tmp_path / "trace.json")
    assert overlaps(boxes) == []

    def of(row: str, stage: str) -> list[tuple[int, int | None]]:
        return [(box.step, box.version) for box in boxes if (box.row, box.stage) == (row, stage)]

    steps = range(1, NUM_STEPS + 1)
    assert of("infer rank 0", "gen") == [(step, max(step - 1 - lookahead, 0)) for step in steps]
    assert of("reward rank 0", "adv") == of("infer rank 0", "gen")
    assert of("ref rank 0", "ref") == of("infer rank 0", "gen")
    assert of("train rank 0", "update_actor") == [(step, step - 1) for step in steps]
    assert of("infer rank 0", "sync") == of("train rank 0", "sync") == of("driver", "sync")
    assert set(of("driver", "sync")) <= {(step, step) for step in steps}
    together = [
        (gen.step, update.step)
        for gen in boxes
        for update in boxes
        if (gen.row, gen.stage, update.row, update.stage) == ("infer rank 0", "gen", "train rank 0", "update_actor")
        and gen.begin < update.end
        and update.begin < gen.end
    ]
    assert set(together) <= {(step + 1, step) for step in steps}  # a busy machine may start one of them late
    assert bool(together) == bool(lookahead)
