"""How a run goes on: at every edge of an epoch, further than planned, in another folder, with another recipe."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlxf.assembly.local import launch
from rlxf.checkpointing.store import list_checkpoints
from rlxf.config.load import load_config
from rlxf.observe.formulas import read_jsonl
from tests.data_world import write_rows
from tests.runs.killed import Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World, command, environment, replay_of, run

STEPS = 6  # two epochs of three steps
UPDATE = "rlxf.update.actor:MegatronActor.update"


def recipe_of(world: World, **training: object) -> Recipe:
    return world.recipe(
        training={"train_iters": STEPS, "save_interval": 2, "eval_interval": 3, **training},
        actor_rollout={"ppo_mini_batch_size": 2},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 2},
    )


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    return recipe_of(world)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(recipe, tmp_path_factory.mktemp("runs") / "undisturbed")


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    other = copy.deepcopy(recipe)
    other[section] |= values
    return other


def killed(recipe: Recipe, run_dir: Path, update: int) -> None:
    """A run that dies before its n-th update."""
    assert run_in_child(recipe, run_dir, Call(UPDATE, update)).code == -signal.SIGKILL


def finish(recipe: Recipe, run_dir: Path) -> str:
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    return ended.output


@pytest.mark.parametrize("stop_after", [2, 3, pytest.param(4, marks=pytest.mark.slow), 5])
def test_before_at_and_after_an_epochs_end_what_is_left_is_trained(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path, stop_after: int
) -> None:
    """A run that was planned shorter ends with a checkpoint at its last step, and goes on from there."""
    run_dir = tmp_path / "run"
    short = changed(recipe, "training", train_iters=stop_after, save_interval=0, eval_interval=0)
    finish(short, run_dir)
    assert f"resumed from {run_dir / 'checkpoints' / f'iter_{stop_after:07d}'}" in finish(recipe, run_dir)
    resumed = Finished(run_dir)
    without_eval = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in undisturbed.numbers]
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in resumed.numbers] == without_eval
    assert (run_dir / "rollouts.jsonl").read_bytes() == (undisturbed.folder / "rollouts.jsonl").read_bytes()
    assert all(torch.equal(value, resumed.weights[name]) for name, value in undisturbed.weights.items())
    # Each process compares its own second and third step with the plan.
    compared = [*range(3, stop_after + 1), *range(stop_after + 3, STEPS + 1)]
    assert [row["step"] for row in resumed.rows if "plan/gen_ratio" in row] == compared
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan.get("measured", {}).get("steps") == ([stop_after + 2, stop_after + 3] if stop_after < 4 else None)
    # It had no evaluation: the initial policy was sampled when the first one came, and says what it said at step 0.
    last = [read_jsonl(folder / "eval.jsonl")[-1] for folder in (run_dir, undisturbed.folder)]
    mine, theirs = ({k: v for k, v in row.items() if "_previous" not in k} for row in last)
    assert mine == theirs


def test_a_finished_run_says_so_and_touches_nothing(recipe: Recipe, undisturbed: Finished) -> None:
    def contents() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*") if path.name != ".lock"}

    before = contents()
    output = finish(recipe, undisturbed.folder)
    assert f"complete: {STEPS} of {STEPS} steps" in output
    assert str(undisturbed.folder / "policy") in output
    assert contents() == before


@pytest.mark.slow
def test_rows_that_are_dropped_are_counted_once_whenever_the_run_is_killed(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "too long " * 9 if i in (1, 4, 5) else f"say {i}"} for i in range(11)]
    recipe = world.recipe(
        training={"train_iters": 5, "save_interval": 1},
        actor_rollout={"data_path": str(write_rows(tmp_path / "rows.jsonl", rows))},
        log={"rollouts": True},
    )
    finish(recipe, tmp_path / "whole")
    run_dir = tmp_path / "run"
    for update in (2, 2, 1):  # of what is left: in the second, the third and the fourth step
        killed(recipe, run_dir, update)
    finish(recipe, run_dir)
    assert Finished(run_dir).numbers == Finished(tmp_path / "whole").numbers
    assert {row["data/dropped"] for row in Finished(run_dir).rows} == {1.0, 3.0}
    driver = json.loads((run_dir / "checkpoints" / "iter_0000005" / "driver.json").read_text())
    assert driver["stream"]["position"] == Finished(run_dir).rows[-1]["epoch"] * len(rows)


def test_a_finished_run_whose_policy_is_cut_off_writes_it_again(recipe: Recipe, tmp_path: Path) -> None:
    """As after a power loss in a revision that did not sync it."""
    run_dir, short = tmp_path / "run", changed(recipe, "training", train_iters=2, eval_interval=0)
    finish(short, run_dir)
    policy = run_dir / "policy" / "model.safetensors"
    whole = policy.read_bytes()
    policy.write_bytes(whole[:-1])
    output = finish(short, run_dir)
    assert f"{run_dir / 'policy'}: model.safetensors has {len(whole) - 1} bytes" in output
    assert policy.read_bytes() == whole
    assert "complete: 2 of 2 steps" in finish(short, run_dir)


def test_a_new_run_folder_gets_files_of_its_own(world: World, undisturbed: Finished, tmp_path: Path) -> None:
    """The same command again, whose run folder carries the date; ``actor_rollout.save`` holds the checkpoints."""
    recipe = changed(recipe_of(world), "actor_rollout", save=str(tmp_path / "ckpt"))
    killed(recipe, tmp_path / "monday", 4)
    output = finish(recipe, tmp_path / "tuesday")
    assert f"resumed from {tmp_path / 'ckpt' / 'iter_0000002'}: 2 of {STEPS} steps" in output
    assert [row["step"] for row in Finished(tmp_path / "monday").rows] == [1, 2, 3]
    tuesday = Finished(tmp_path / "tuesday")
    assert tuesday.numbers == undisturbed.numbers[2:]
    assert {row["step"] for row in tuesday.rollouts} == {3, 4, 5, 6}
    assert all(torch.equal(value, tuesday.weights[name]) for name, value in undisturbed.weights.items())
    summary, whole = (
        json.loads((folder / "summary.json").read_text()) for folder in (tuesday.folder, undisturbed.folder)
    )
    assert summary["start"]["eval/reward"] == whole["start"]["eval/reward"]


def test_the_reference_and_the_win_rate_stay_where_they_began(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path
) -> None:
    """``eval/kl`` and ``rewards/*`` are measured against ``ref.load``, whatever checkpoint the policy came from."""
    run_dir = tmp_path / "run"
    killed(recipe, run_dir, 6)  # from step 4 on, with a policy that has moved
    finish(recipe, run_dir)
    assert_same_run(run_dir, undisturbed)
    last = read_jsonl(run_dir / "eval.jsonl")[-1]
    assert abs(last["eval/kl"]) > 0.1  # were the reference the checkpoint's policy, it would be near 0
    assert (run_dir / "eval.jsonl").read_bytes() == (undisturbed.folder / "eval.jsonl").read_bytes()


def test_a_changed_recipe_is_warned_about_by_name(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    killed(recipe, run_dir, 4)
    output = finish(changed(recipe, "actor_rollout", lr=5e-4, micro_batch_size=1), run_dir)
    assert "the recipe has changed since iter_0000002: actor_rollout.lr 0.001 -> 0.0005;" in output
    assert "the layout has changed since iter_0000002: actor_rollout.micro_batch_size 2 -> 1" in output
    assert [row["learning_rate"] for row in Finished(run_dir).rows] == [1e-3] * 2 + [5e-4] * 4


def test_other_data_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    killed(recipe, run_dir, 4)
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"sing {i}"} for i in range(8)])
    ended = run_in_child(changed(recipe, "actor_rollout", data_path=str(other)), run_dir)
    assert ended.code == 4
    assert "prompts.jsonl" in ended.output
    assert "other.jsonl" in ended.output


def test_tensorboard_shows_each_step_once(world: World, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run_dir = changed(recipe_of(world, train_iters=4), "log", tensorboard=True), tmp_path / "run"
    killed(recipe, run_dir, 4)  # step 3 is in the files; the run goes on after step 2
    finish(recipe, run_dir)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    losses = [row["loss"] for row in Finished(run_dir).rows]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_offline_and_replay_go_on_too(world: World, recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    offline = world.recipe(
        training={"stage": "dpo", "train_iters": STEPS, "save_interval": 2},
        actor_rollout={"data_path": str(write_rows(tmp_path / "pairs.jsonl", pairs))},
        reward={"model": None, "load": None},
    )
    replay = replay_of(changed(recipe, "training", eval_interval=0), undisturbed.folder / "rollouts.jsonl")
    for name, values in (("offline", offline), ("replay", replay)):
        finish(values, tmp_path / name)
        killed(values, tmp_path / f"{name}_killed", 4)
        finish(values, tmp_path / f"{name}_killed")
        whole, resumed = Finished(tmp_path / name), Finished(tmp_path / f"{name}_killed")
        assert resumed.numbers == whole.numbers
        assert all(torch.equal(value, resumed.weights[key]) for key, value in whole.weights.items())
        driver = json.loads((list_checkpoints(resumed.folder / "checkpoints")[-1] / "driver.json").read_text())
        assert len(driver["prompt_ids"]) == 4


@pytest.mark.slow
def test_what_was_dropped_and_probed_is_told_after_a_resume_too(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}" + " and so on" * (i % 3 == 1)} for i in range(16)]  # every third is too long
    recipe = world.recipe(
        training={"train_iters": STEPS, "save_interval": 2},
        actor_rollout={"data_path": str(write_rows(tmp_path / "prompts.jsonl", rows)), "max_prompt_length": 12},
        sync={"verify_first": 1, "verify_interval": 4},
    )
    whole = run(recipe, tmp_path / "whole")
    run(changed(recipe, "training", train_iters=2), tmp_path / "run")
    launch(load_config({"runtime": "local", **recipe}), tmp_path / "run")
    assert Finished(tmp_path / "run").numbers == whole.numbers
    dropped = [row["data/dropped"] for row in whole.rows]
    assert 0 < dropped[0] < dropped[1] <= dropped[-1] == 5
    probed = {row["step"]: row.get("sync/probe_difference") for row in whole.rows}
    assert [step for step, value in probed.items() if value is not None] == [1, 4]
    assert 0 <= probed[4] < 1e-4


@pytest.mark.slow
def test_the_real_command_killed_and_typed_again(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(recipe, run_dir, "runtime=local")
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list_checkpoints(run_dir / "checkpoints"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "INFO: resumed from" in done.stderr
    assert "Warning" not in done.stderr
    assert_same_run(run_dir, undisturbed)
    assert sys.executable in arguments
