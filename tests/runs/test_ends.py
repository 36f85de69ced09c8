"""Whatever ends a run, its last complete step is saved, and the run that goes on is the one without that fault.

Faults are injected into real runs, in processes of their own (``tests/runs/killed.py``). No checkpoint is due in these
recipes, so what is there was saved at the end. Faults of worker processes: ``tests/cluster/test_ends.py``.
"""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path

import pytest

from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.store import list_checkpoints
from tests.runs.killed import Call, Ended, Moment, Poison, Raise, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World

STEPS = 6
ENGINE, ACTOR, SYNC = "rlxf.rollout.hf:HfEngine", "rlxf.update.actor:MegatronActor", "rlxf.sync.push:WeightSync"
OPTIMIZER = "rlxf.models.megatron.optimizer:TrainableModel"
OS_ERROR = "builtins:OSError"


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    """Two optimizer steps a step; evaluations, a reference of its own, no checkpoint but at the end."""
    return world.recipe(
        training={"train_iters": STEPS, "eval_interval": 3, "save_hf_interval": 3},
        actor_rollout={"ppo_mini_batch_size": 2, "lr_decay_style": "cosine"},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(recipe, tmp_path_factory.mktemp("runs") / "undisturbed")


def ends(recipe: Recipe, run_dir: Path, fault: Moment) -> Ended:
    ended = run_in_child(recipe, run_dir, fault)
    assert ended.code not in (0, -signal.SIGKILL), f"{fault} did not come\n{ended.output}"
    return ended


def assert_saved(ended: Ended, run_dir: Path, step: int) -> None:
    """The checkpoint of that step is there, whole, and named with the command that goes on."""
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    assert f"saved: {step} of {STEPS} steps, {folder}" in ended.output
    assert re.search(
        rf"^to go on: python ray_gpt\.py --config-name small hydra\.run\.dir={run_dir}$", ended.output, re.M
    )
    assert list_checkpoints(run_dir / "checkpoints") == [folder]
    assert find_problems(folder) == []


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        # Before the first step an evaluation samples three times, after the third twice.
        (Raise("rlxf.score.reward_model:RewardModelScorer.score", "rlxf.core.errors:TrainingError", number=6), 2),
        (Raise(f"{ENGINE}.generate", "rlxf.core.errors:WorkerLost", number=11), 5),
        (Raise("rlxf.reference.frozen:FrozenReference.logps", "rlxf.core.errors:StageTimeout", number=3), 2),
        (Poison(row=0, number=4), 3),  # a loss that is not finite, in the first mini-batch
        (Raise("rlxf.observe.record:RolloutRecorder.write", OS_ERROR, "No space left on device", number=5), 4),
        (Raise("rlxf.observe.sinks:JsonlSink.write", OS_ERROR, "No space left on device", number=6), 4),
        (Raise(f"{ENGINE}.load_bucket", "rlxf.core.errors:SyncError", number=3), 3),  # a push that failed, and
        (Raise(f"{SYNC}._verify", "rlxf.core.errors:SyncError", number=2), 2),  # a probe: the step is complete
        (Raise("rlxf.evaluate:Evaluation._sample", "rlxf.core.errors:ConfigError", number=4), 3),
        (Raise(f"{ACTOR}.save_hf", OS_ERROR, "Read-only file system", number=1, errno=errno.EROFS), 3),
        (Raise(f"{ACTOR}.save_hf", OS_ERROR, "Permission denied", number=3, errno=errno.EACCES), 6),  # the policy
    ],
    ids=lambda value: value.target.split(":")[1] if isinstance(value, Raise) else None,
)  # fmt: skip
def test_the_last_complete_step_is_saved(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path, fault: Moment, step: int
) -> None:
    run_dir = tmp_path / "run"
    ended = ends(recipe, run_dir, fault)
    assert_saved(ended, run_dir, step)
    again = run_in_child(recipe, run_dir)
    assert again.code == 0, again.output
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Poison(row=3, number=4), "step 4 failed after its first optimizer step"),
        (Raise(f"{OPTIMIZER}.step", "builtins:MemoryError", number=8, after=True), "step 4 failed after its first"),
        (Raise(f"{OPTIMIZER}.step", "builtins:MemoryError", number=7, after=True), "step 4 failed after its first"),
    ],
    ids=["loss", "after the second", "after the first"],
)
def test_an_update_that_broke_off_saves_nothing_and_names_the_checkpoint_before(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path, fault: Moment, reason: str
) -> None:
    run_dir = tmp_path / "run"
    ended = ends({**recipe, "training": {**recipe["training"], "save_interval": 2}}, run_dir, fault)
    newest = run_dir / "checkpoints" / "iter_0000002"
    assert f"not saved: {reason}" in ended.output
    assert f"the newest checkpoint is {newest}\n" in ended.output
    assert list_checkpoints(run_dir / "checkpoints") == [newest]
    assert "no parameter was changed" not in ended.output
    again = run_in_child(recipe, run_dir)
    assert again.code == 0, again.output
    assert_same_run(run_dir, undisturbed)


def test_without_a_checkpoint_a_broken_update_says_so(recipe: Recipe, tmp_path: Path) -> None:
    ended = ends(recipe, tmp_path / "run", Poison(row=3, number=2))
    assert "; there is no checkpoint\n" in ended.output
    assert "to go on" not in ended.output


def test_a_stop_during_a_long_update_waits_for_it_and_saves_it(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path
) -> None:
    """In one process nothing cuts an update: that it took longer than the grace period loses nothing."""
    run_dir = tmp_path / "run"
    impatient = {**recipe, "training": {**recipe["training"], "stop_grace_s": 0.0}}
    ended = ends(impatient, run_dir, Call(f"{OPTIMIZER}.step", 5, signal=signal.SIGTERM))  # of step 3
    assert ended.code == 128 + signal.SIGTERM
    assert_saved(ended, run_dir, 3)
    assert run_in_child(recipe, run_dir).code == 0
    assert_same_run(run_dir, undisturbed)


TIES = """
def reward(prompts, completions, completion_ids, **columns):
    step = min(columns["number"]) // 4  # prompts come in file order, four a step
    return [0.0 if step in (1, 2) else float(sum(ids) % 7) for ids in completion_ids]
"""


def test_tied_steps_go_on_as_with_the_higher_limit(recipe: Recipe, world: World, tmp_path: Path) -> None:
    ties = {
        **recipe,
        "actor_rollout": {**recipe["actor_rollout"], "no_shuffle": True},
        "reward": world.reward_function(tmp_path, TIES),
        "training": {**recipe["training"], "eval_interval": 6},
    }
    higher, lower = ({**ties, "algorithm": {"max_empty_steps": limit}} for limit in (3, 2))
    whole = run_in_child(higher, tmp_path / "whole")
    assert whole.code == 0, whole.output
    assert ["loss" in row for row in Finished(tmp_path / "whole").rows] == [True, False, False, True, False, False]
    run_dir = tmp_path / "run"
    ended = run_in_child(lower, run_dir)
    assert ended.code == 1
    assert "2 steps in a row gave no pair" in ended.output
    assert_saved(ended, run_dir, 2)  # the third is not complete: it is made again with the higher limit
    again = run_in_child(higher, run_dir)
    assert again.code == 0, again.output
    assert_same_run(run_dir, Finished(tmp_path / "whole"))


RAISES = """
from pathlib import Path

calls = 0

def reward(prompts, completions, completion_ids, **columns):
    global calls
    calls += 1
    if calls == 7 and Path(FLAG).exists():  # three of them for the first evaluation
        raise RuntimeError("the service is down")
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


def test_a_reward_function_that_raises_loses_no_step(recipe: Recipe, world: World, tmp_path: Path) -> None:
    flag = tmp_path / "down"
    code = RAISES.replace("FLAG", repr(str(flag)))
    own = {**recipe, "reward": world.reward_function(tmp_path, code)}
    assert run_in_child(own, tmp_path / "whole").code == 0
    flag.touch()
    run_dir = tmp_path / "run"
    ended = run_in_child(own, run_dir)
    assert ended.code != 0
    assert "the service is down" in ended.output
    assert_saved(ended, run_dir, 3)
    flag.unlink()
    assert run_in_child(own, run_dir).code == 0
    assert_same_run(run_dir, Finished(tmp_path / "whole"))


def test_a_move_of_the_reference_that_broke_off_saves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    moving = {**recipe, "ref": {**recipe["ref"], "ref_update_interval": 2}}
    run_dir = tmp_path / "run"
    ended = ends(moving, run_dir, Raise("rlxf.reference.frozen:FrozenReference.mix", "rlxf.core.errors:WorkerLost"))
    assert "not saved: the move of the reference after step 2 did not finish" in ended.output
    assert list_checkpoints(run_dir / "checkpoints") == []


def test_a_checkpoint_in_the_background_is_published_whatever_ends_the_run(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path
) -> None:
    """The update of step 3 breaks off while the checkpoint of step 2 is being written."""
    background = {**recipe, "training": {**recipe["training"], "save_interval": 2, "async_save": True}}
    run_dir = tmp_path / "run"
    ended = ends(background, run_dir, Poison(row=3, number=3))
    assert "not saved: step 3 failed after its first optimizer step" in ended.output
    assert f"the newest checkpoint is {run_dir / 'checkpoints' / 'iter_0000002'}" in ended.output
    assert run_in_child(recipe, run_dir).code == 0
    assert_same_run(run_dir, undisturbed)
