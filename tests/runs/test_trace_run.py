"""The trace of a run that was killed in the middle and went on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlxf.assembly import local
from rlxf.config.load import load_config
from rlxf.core.errors import DataError
from tests.runs.killed import Call, run_in_child
from tests.runs.small import Finished, World, run
from tests.traces import overlaps, read_boxes

STEPS = 3
ROWS = {"driver", "train rank 0", "infer rank 0", "ref rank 0", "reward rank 0"}


def test_a_killed_run_leaves_a_trace_that_opens_and_the_resumed_one_goes_on_in_it(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        training={"train_iters": STEPS, "save_interval": 1, "eval_interval": 2}, eval={"num_prompts": 4},
        log={"trace": True},
    )  # fmt: skip
    done = Finished(tmp_path / "run")
    second_push = Call("rlxf.sync.push:WeightSync.push", 3)  # the first is before the first step
    assert run_in_child(recipe, done.folder, second_push).code == -signal.SIGKILL
    killed = read_boxes(done.folder / "trace.json")
    assert {box.row for box in killed} == ROWS
    assert [box.step for box in killed if (box.row, box.stage) == ("train rank 0", "update_actor")] == [1, 2]

    assert run_in_child(recipe, done.folder).code == 0
    boxes = read_boxes(done.folder / "trace.json")
    assert boxes[: len(killed)] == killed
    assert {box.row for box in boxes} == ROWS
    assert overlaps(boxes) == []
    assert min(box.begin for box in boxes[len(killed) :]) > max(box.end for box in killed)
    trained = [(box.step, box.version) for box in boxes if (box.row, box.stage) == ("train rank 0", "update_actor")]
    assert trained == [(1, 0), (2, 1), (2, 1), (3, 2)]  # the step that was killed is made again
    evaluated = [(box.row, box.step) for box in boxes if box.stage == "eval"]
    assert set(evaluated) == {(row, step) for row in ROWS for step in (2, 3)}
    assert [row["step"] for row in done.rows] == [1, 2, 3]


def test_another_file_of_that_name_is_told_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(world.recipe(training={"train_iters": 1}), tmp_path / "run")
    (done.folder / "trace.json").write_text("mine\n")
    longer = world.recipe(training={"train_iters": 2}, log={"trace": True})
    monkeypatch.setattr(local, "build_roles", lambda *_: pytest.fail("loads models"))
    with pytest.raises(DataError, match=r"trace\.json: is no trace of a run"):
        local.launch(load_config({"runtime": "local", **longer}), done.folder)
    assert (done.folder / "trace.json").read_text() == "mine\n"
