"""Steps that wait in a checkpoint are trained on as they were sampled, whatever the recipe says by then."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlxf.assembly.local import launch
from rlxf.checkpointing.manifest import write_manifest
from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from rlxf.config.load import load_config
from tests.runs.killed import Call, assert_same_run, run_in_child
from tests.runs.small import Finished, Recipe, World, run
from tests.runs.test_lookahead import UPDATE, recipe_of, versions
from tests.stored import unpack

STEPS = 8


def recipe(world: World, lookahead: int, **changes: dict[str, Any]) -> Recipe:
    found = recipe_of(world, lookahead, **changes)
    found["training"] = {**found["training"], "train_iters": STEPS, "eval_interval": 0, **changes.get("training", {})}
    return found


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Finished]:
    """Undisturbed runs by their lookahead."""
    folder = tmp_path_factory.mktemp("whole")
    return {lookahead: run(recipe(world, lookahead), folder / f"run{lookahead}") for lookahead in (0, 1, 4)}


@pytest.fixture(scope="module")
def cut(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same runs, killed before their fourth update: the newest checkpoint is after two steps."""
    folder = tmp_path_factory.mktemp("cut")
    for lookahead in (0, 1, 4):
        ended = run_in_child(recipe(world, lookahead), folder / f"run{lookahead}", Call(UPDATE, 4))
        assert ended.code == -signal.SIGKILL
    return {lookahead: folder / f"run{lookahead}" for lookahead in (0, 1, 4)}


def go_on(recipe: Recipe, run_dir: Path) -> Finished:
    launch(load_config({"runtime": "local", **recipe}), run_dir)
    return Finished(run_dir)


def rows_of(finished: Finished, *steps: int) -> list[dict[str, Any]]:
    """Steps count from 0 here, and from 1 in the file."""
    return [row for row in finished.rollouts if row["step"] - 1 in steps]


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (1, 4), (4, 1)])
def test_with_another_lookahead(
    world: World,
    whole: dict[int, Finished],
    cut: dict[int, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: int,
    after: int,
) -> None:
    run_dir = shutil.copytree(cut[before], tmp_path / "run")
    done = go_on(recipe(world, after), run_dir)
    waiting = range(2, 2 + before)
    assert rows_of(done, 0, 1, *waiting) == rows_of(whole[before], 0, 1, *waiting)
    sampled_at = {step: max(2, step - after) for step in range(2 + before, STEPS)}  # the formula from step 2 on
    assert versions(done)[2 + before :] == list(sampled_at.values())
    lags = [row["sync/version_lag"] for row in done.rows]
    assert lags[2:] == [step - version for step, version in enumerate(versions(done))][2:]
    assert f"rollout.lookahead {before} -> {after}" in caplog.text  # the results change
    said = {
        0: "",
        1: "iter_0000002 holds a step that was sampled ahead and will be trained on as it was sampled; the new "
        "rollout.lookahead applies from step 4 on",
        4: "iter_0000002 holds 4 steps that were sampled ahead and will be trained on as they were sampled; the new "
        "rollout.lookahead applies from step 7 on",
    }[before]
    assert said in caplog.text
    assert ("sampled ahead" in caplog.text) == (before > 0)


def test_and_it_goes_on_exactly_from_there(world: World, cut: dict[int, Path], tmp_path: Path) -> None:
    """A run that was resumed with more steps ahead, undisturbed from there or killed twice."""
    more = recipe(world, 4)
    undisturbed = go_on(more, shutil.copytree(cut[1], tmp_path / "undisturbed"))
    run_dir = shutil.copytree(cut[1], tmp_path / "run")
    for moment in (
        Call(
            "rlxf.algorithms.online_dpo:_sample", 3, signal=signal.SIGTERM
        ),  # the first process that has the new value
        Call(UPDATE, 4),
    ):
        assert run_in_child(more, run_dir, moment).code != 0
    ended = run_in_child(more, run_dir)
    assert ended.code == 0, ended.output
    assert_same_run(run_dir, undisturbed)


def test_with_another_batch_no_prompt_is_skipped_or_comes_twice(world: World, tmp_path: Path) -> None:
    in_order = recipe(world, 1, actor_rollout={"no_shuffle": True})
    run_dir = tmp_path / "run"
    assert run_in_child(in_order, run_dir, Call(UPDATE, 4)).code == -signal.SIGKILL
    changed = recipe(world, 1, actor_rollout={"no_shuffle": True}, training={"global_batch_size": 3})
    done = go_on(changed, run_dir)
    counts = [len(rows_of(done, step)) for step in range(STEPS)]
    assert counts == [4, 4, 4, *[3] * (STEPS - 3)]  # the third step waited
    prompts = [row["prompt_ids"] for row in done.rollouts]
    assert prompts[:12] == prompts[12:24]  # two epochs in file order
    assert len({tuple(ids) for ids in prompts[:12]}) == 12


def test_with_another_seed(
    world: World, whole: dict[int, Finished], cut: dict[int, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = shutil.copytree(cut[1], tmp_path / "run")
    done = go_on(recipe(world, 1, training={"seed": 6}), run_dir)
    assert rows_of(done, 0, 1, 2) == rows_of(whole[1], 0, 1, 2)
    assert rows_of(done, 3) != rows_of(whole[1], 3)
    assert versions(done) == [0, 0, 1, 2, 3, 4, 5, 6]
    assert "the new training.seed applies from step 4 on" in caplog.text


@pytest.mark.slow
def test_with_other_pairs_the_reference_is_asked_again(world: World, cut: dict[int, Path], tmp_path: Path) -> None:
    """Scores of a step that waits stay as they are, but the recipe may make other pairs of them."""
    changed = recipe(world, 1, actor_rollout={"missing_eos_penalty": 5.0})
    done = go_on(changed, shutil.copytree(cut[1], tmp_path / "run"))
    forgot = shutil.copytree(cut[1], tmp_path / "forgot")
    newest = list_checkpoints(forgot / "checkpoints")[-1]
    (path,) = (newest / "waiting").glob("*.safetensors")
    tensors = load_file(path)
    assert {"reference.chosen", "reference.rejected"} <= tensors.keys()
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("reference.")}, path)
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    assert done.numbers == go_on(changed, forgot).numbers


@pytest.mark.slow
def test_more_steps_after_a_finished_run_are_not_the_longer_run(
    world: World, whole: dict[int, Finished], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run(recipe(world, 1, training={"train_iters": 4}), run_dir)
    done = go_on(recipe(world, 1), run_dir)
    assert versions(done) == [0, 0, 1, 2, 4, 4, 5, 6]  # nothing waited, so the run begins anew there
    assert rows_of(done, 0, 1, 2, 3) == rows_of(whole[1], 0, 1, 2, 3)


def test_fewer_steps_than_wait(world: World, whole: dict[int, Finished], cut: dict[int, Path], tmp_path: Path) -> None:
    """What waits behind the new end is dropped; with more steps again its prompts are sampled, and come once."""
    run_dir = shutil.copytree(cut[4], tmp_path / "run")
    done = go_on(recipe(world, 4, training={"train_iters": 4}), run_dir)
    assert done.rollouts == rows_of(whole[4], 0, 1, 2, 3)
    assert load_waiting(run_dir / "checkpoints" / "iter_0000004") == []
    done = go_on(recipe(world, 4), run_dir)
    assert versions(done) == [0, 0, 0, 0, 4, 4, 4, 4]
    prompts = [[row["prompt_ids"] for row in finished.rollouts] for finished in (done, whole[4])]
    assert prompts[0] == prompts[1]


def test_a_checkpoint_of_an_earlier_version_goes_on_ahead(tmp_path: Path) -> None:
    stored = unpack(tmp_path / "stored")
    ahead = stored.recipe
    ahead.setdefault("rollout", {})["lookahead"] = 1
    done = go_on(ahead, stored.folder / "run")
    assert [row["step"] for row in done.rows] == [1, 2, 3, 4, 5, 6]
    assert versions(done)[3:] == [3, 3, 4]
