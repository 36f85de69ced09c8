"""A disk that is full for a while, in a whole run: nothing is lost, doubled or left behind. Needs root for the disk.

What each writer does, with injected errors and without root: ``tests/unit/core/test_kept_file.py``,
``tests/unit/checkpointing/test_failed_saves.py``.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.store import list_checkpoints
from tests.disks import FILLER, small_disk
from tests.runs.killed import FullDisk, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World
from tests.traces import read_boxes

STEPS = 8


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    return world.recipe(
        training={"train_iters": STEPS, "eval_interval": 2, "save_interval": 3},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 1, "trace": True, "tensorboard": True},
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(recipe, tmp_path_factory.mktemp("runs") / "undisturbed")


def scalars(run_dir: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def boxes(run_dir: Path) -> list[tuple[str, str, int]]:
    """All but evaluations and saves: one that is not due takes no time, and is seen or not, as the clock has it."""
    found = read_boxes(run_dir / "trace.json")
    return [(box.row, box.stage, box.step) for box in found if box.stage not in ("eval", "save")]


@pytest.mark.parametrize(
    "moment",
    ["rlxf.update.actor:MegatronActor.update", "rlxf.update.actor:MegatronActor.save_checkpoint"],
    ids=["in an update", "in a save"],
)
def test_a_full_disk_for_seconds_changes_nothing(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path, moment: str
) -> None:
    with small_disk(tmp_path / "disk", "32m") as disk:
        run_dir = tmp_path / "disk" / "run"
        number = 1 if moment.endswith("checkpoint") else 2
        ended = run_in_child(recipe, run_dir, FullDisk(disk, moment, number), log=tmp_path / "log")
        assert ended.code == 0, ended.output
        if number == 2:
            assert "metrics.jsonl: No space left on device (ENOSPC)" in ended.output
            assert "metrics.jsonl: written again after" in ended.output
        assert_same_run(run_dir, undisturbed)
        assert scalars(run_dir) == scalars(undisturbed.folder)
        assert boxes(run_dir) == boxes(undisturbed.folder)
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        assert [path.name for path in checkpoints] == ["iter_0000003", "iter_0000006", "iter_0000008"]
        assert not any(find_problems(path) for path in checkpoints)
        assert not (disk / FILLER).exists()
        assert left(run_dir) == left(undisturbed.folder)


def test_a_run_that_is_killed_meanwhile_goes_on_as_if_nothing_had_been(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path
) -> None:
    """The checkpoint of step 3 is on another disk, and holds the rows of steps 2 and 3."""
    elsewhere = {**recipe, "actor_rollout": {**recipe["actor_rollout"], "save": str(tmp_path / "checkpoints")}}
    with small_disk(tmp_path / "disk", "32m") as disk:
        run_dir = disk / "run"
        moment = FullDisk(disk, "rlxf.update.actor:MegatronActor.update", 2, killed=6)
        ended = run_in_child(elsewhere, run_dir, moment, log=tmp_path / "log")
        assert ended.code == -signal.SIGKILL, ended.output
        assert [row["step"] for row in Finished(run_dir).rows] == [1]
        assert (tmp_path / "checkpoints" / "iter_0000003" / "rows" / "metrics.jsonl").is_file()
        (disk / FILLER).unlink()
        ended = run_in_child(elsewhere, run_dir, log=tmp_path / "log")
        assert ended.code == 0, ended.output
        assert_same_run(run_dir, undisturbed)


def left(run_dir: Path) -> list[str]:
    names = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if "tfevents" not in path.name]
    return sorted(name for name in names if name != "events.jsonl")
