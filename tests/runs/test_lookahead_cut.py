"""A step was being sampled when the run ended, beside an update that was completed.

The checkpoint then holds the weights that sampled it, because the trainer's are newer, and a resumed run samples it
again. On Ray, with real workers: ``tests/cluster/test_lookahead.py``.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from tests.data_world import write_rows
from tests.runs.killed import Beside, Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World
from tests.runs.test_kill import flip_one_bit
from tests.runs.test_lookahead import recipe_of, versions
from tests.runs.test_lookahead_resume import go_on, rows_of

UPDATE = "rlxf.update.actor:MegatronActor.update"


def recipe(world: World, lookahead: int = 1, **changes: dict[str, Any]) -> Recipe:
    """Eight steps, a checkpoint only where the run ends."""
    training = {"train_iters": 8, "save_interval": 0, "eval_interval": 0, **changes.pop("training", {})}
    return recipe_of(world, lookahead, training=training, **changes)


def cut(recipe: Recipe, run_dir: Path, fault: Beside, saved: int, *waiting: tuple[int, bool]) -> Path:
    """The checkpoint of a run that was cut; ``waiting``: the steps in it, and whether they are sampled."""
    ended = run_in_child(recipe, run_dir, fault)
    assert ended.code == (128 + signal.SIGTERM if fault.by_signal else 1), ended.output
    assert "Traceback" not in ended.output
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert f"saved: {saved} of 8 steps, {newest}" in ended.output
    assert [(item.step, item.rollouts is not None) for item in load_waiting(newest)] == list(waiting)
    assert list((newest / "pushed").glob("*.safetensors"))
    return newest


def finish(recipe: Recipe, run_dir: Path) -> str:
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    assert "damaged" not in ended.output
    return ended.output


@pytest.mark.slow
def test_threads_change_nothing(world: World, tmp_path: Path) -> None:
    """What ``Beside`` adds to a run is not seen in its numbers."""
    moving = recipe(world, ref={"ref_update_interval": 2}, training={"eval_interval": 3, "save_interval": 2})
    whole = undisturbed_run(moving, tmp_path / "whole")
    assert run_in_child(moving, tmp_path / "run", Beside()).code == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("by_signal", "changes"),
    [
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(
            True,
            {"ref": {"ref_update_interval": 2}, "training": {"eval_interval": 2, "save_hf_interval": 2}},
            marks=pytest.mark.slow,
        ),
        (False, {"actor_rollout": {"lora_r": 4, "lora_alpha": 8, "lr": 1e-2}}),
    ],
    ids=["frozen", "moving", "lora"],
)
def test_it_is_sampled_again_by_the_same_weights(
    world: World, tmp_path: Path, by_signal: bool, changes: dict[str, Any]
) -> None:
    wanted = recipe(world, **changes)
    whole = undisturbed_run(wanted, tmp_path / "whole")
    first = 3 if "training" in changes else 0  # calls of the evaluation before the first step
    # The third step is sampled by version 1, beside the second update.
    newest = cut(wanted, tmp_path / "run", Beside(first + 3, 2, by_signal), 2, (2, False))
    # A process that dies, or is stopped, while it samples that step again has changed nothing.
    for moment in (
        Call("rlxf.sync.push:WeightSync.push_saved", after=True),
        Call("rlxf.algorithms.online_dpo:_sample", signal=signal.SIGTERM),
        Call("rlxf.sync.push:WeightSync.push", 1),
    ):
        assert run_in_child(wanted, tmp_path / "run", moment).code in (-signal.SIGKILL, 128 + signal.SIGTERM)
        assert list_checkpoints(tmp_path / "run" / "checkpoints") == [newest]
    finish(wanted, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_several_times_in_one_run(world: World, tmp_path: Path) -> None:
    wanted = recipe(world, 4)
    whole = undisturbed_run(wanted, tmp_path / "whole")
    run_dir = tmp_path / "run"
    cut(wanted, run_dir, Beside(6, 2), 2, (2, True), (3, True), (4, True), (5, False))
    # The resumed process samples step 6 again, then the seventh one beside the update of the third.
    cut(wanted, run_dir, Beside(2, 1, by_signal=True), 3, (3, True), (4, True), (5, True), (6, False))
    finish(wanted, run_dir)
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_rows_that_are_left_out_are_counted_as_in_the_undisturbed_run(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "too long " * 9 if i % 4 == 1 else f"say {i}"} for i in range(40)]
    wanted = recipe(world, 4, actor_rollout={"data_path": str(write_rows(tmp_path / "rows.jsonl", rows))})
    fewer = recipe(world, 1, actor_rollout={"data_path": str(tmp_path / "rows.jsonl")})
    first = run_in_child(
        fewer, tmp_path / "first", Call("rlxf.algorithms.online_dpo:_sample", 3, signal=signal.SIGTERM)
    )
    assert first.code == 128 + signal.SIGTERM
    # With four steps ahead from here on, three are being sampled, or wait for it, beside one update.
    whole_dir = shutil.copytree(tmp_path / "first", tmp_path / "whole")
    finish(wanted, whole_dir)
    run_dir = shutil.copytree(tmp_path / "first", tmp_path / "run")
    cut(wanted, run_dir, Beside(2, 1), 2, (2, True), (3, False), (4, False), (5, False))
    finish(wanted, run_dir)
    assert_same_run(run_dir, Finished(whole_dir))
    dropped = [row["data/dropped"] for row in Finished(run_dir).rows]
    assert dropped == sorted(dropped)
    assert len(set(dropped)) > 3


@pytest.fixture
def in_order(world: World) -> dict[str, Any]:
    return {"actor_rollout": {"no_shuffle": True}}


@pytest.mark.slow
def test_with_another_recipe_it_is_a_step_that_was_never_sampled(
    world: World, in_order: dict[str, Any], tmp_path: Path
) -> None:
    """It follows the new values from the boundary on at which the run goes on, and no row is lost with it."""
    cut(recipe(world, **in_order), tmp_path / "cut", Beside(3, 2), 2, (2, False))
    changed = {
        "batch": (recipe(world, **in_order, training={"global_batch_size": 3}), [2, 2, 3, 4, 5, 6]),
        "seed": (recipe(world, **in_order, training={"seed": 6}), [2, 2, 3, 4, 5, 6]),
        "none": (recipe(world, 0, **in_order), [2, 3, 4, 5, 6, 7]),
        "more": (recipe(world, 4, **in_order), [2, 2, 2, 2, 2, 3]),
    }
    for name, (wanted, expected) in changed.items():
        done = go_on(wanted, shutil.copytree(tmp_path / "cut", tmp_path / name))
        assert versions(done) == [0, 0, *expected], name
        prompts = [tuple(row["prompt_ids"]) for row in done.rollouts]
        assert len(set(prompts[:12])) == 12, name
        assert prompts[12:24] == prompts[:12], name
        assert len(rows_of(done, 2)) == wanted["training"]["global_batch_size"]


def test_a_run_that_ends_before_it(world: World, tmp_path: Path) -> None:
    """Fewer steps now: it is not sampled."""
    run_dir = tmp_path / "run"
    cut(recipe(world), run_dir, Beside(4, 3), 3, (3, False))
    done = go_on(recipe(world, training={"train_iters": 3}), run_dir)
    assert versions(done) == [0, 0, 1]
    assert (done.folder / "policy").is_dir()


def damaged(folder: Path) -> Iterator[Path]:
    """Each file of what waits and what was pushed, damaged while it is looked at."""
    for path in sorted([*(folder / "waiting").iterdir(), *(folder / "pushed").iterdir()]):
        whole = path.read_bytes()
        flip_one_bit(path)
        yield path
        path.unlink()
        yield path
        path.write_bytes(whole)


def test_damage_to_what_waits_or_was_pushed_is_seen(world: World, tmp_path: Path) -> None:
    wanted = recipe(world, 4)
    run_dir = tmp_path / "run"
    newest = cut(wanted, run_dir, Beside(6, 2), 2, (2, True), (3, True), (4, True), (5, False))
    names = []
    for path in damaged(newest):
        ended = run_in_child(wanted, run_dir)
        name = str(path.relative_to(newest))
        assert ended.code == 4, ended.output
        assert f"{newest}: {name} " in ended.output
        assert "restore one; or start from the beginning with training.resume=never" in ended.output
        assert "Traceback" not in ended.output
        names.append(name)
    assert {"waiting/0000002.json", "waiting/0000002.safetensors", "waiting/0000005.json"} <= set(names)
    assert any(name.startswith("pushed/") for name in names)
