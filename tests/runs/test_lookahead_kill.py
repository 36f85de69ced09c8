"""A run whose sampling is ahead of its training survives kills and signals at any moment, as one without does.

What waits to be trained on is in the checkpoint. The chains are those of ``test_kill.py``, with ``rollout.lookahead``
and a reference that moves, so that a step that waits holds log-probabilities that no later reference gives.
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from tests.runs.killed import Call, File, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World
from tests.runs.test_kill import assert_survives, assert_survives_random_kills, flip_one_bit

STEPS = 6
ONLINE, ACTOR, FOLDER = "rlxf.algorithms.online_dpo", "rlxf.update.actor", "rlxf.checkpointing.run_folder"
ENGINE, REFERENCE = "rlxf.rollout.hf:HfEngine", "rlxf.reference.frozen:FrozenReference"
MODEL, BUILD = "rlxf.models.megatron.optimizer:TrainableModel", "rlxf.assembly.build_run"
EVALUATION, RECORDER, ROW = (
    "rlxf.evaluate:Evaluation._sample",
    "rlxf.observe.record:RolloutRecorder.write",
    "rlxf.observe.sinks:JsonlSink.write",
)
TERM = signal.SIGTERM


def recipe_of(world: World, lookahead: int) -> Recipe:
    """An epoch is three steps, a step two optimizer steps; the reference moves after every second one."""
    return world.recipe(
        training={
            "train_iters": STEPS, "save_interval": 2, "keep_latest": 2, "eval_interval": 3, "save_hf_interval": 3
        },
        actor_rollout={"ppo_mini_batch_size": 2, "shuffle_minibatch": True, "lr_decay_style": "cosine"},
        ref={"ref_update_interval": 2},
        rollout={"lookahead": lookahead},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    return recipe_of(world, 1)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(recipe, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture(scope="module")
def four(world: World) -> Recipe:
    return recipe_of(world, 4)


@pytest.fixture(scope="module")
def undisturbed_four(four: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(four, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.mark.slow
def test_killed_while_steps_are_collected_ahead(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call(f"{ONLINE}:_sample", 2),  # step 2 at the start, before any update
        Call(f"{ONLINE}:_score_and_pair", 2),
        Call(f"{REFERENCE}.logps", 2),
        Call(f"{ONLINE}:_sample", 4),  # step 4, after the checkpoint of two steps: step 3 waits in it
        Call(f"{ENGINE}.generate", 1, after=True),  # sampled, and nothing knows it
        Call(f"{ONLINE}:_score_and_pair", 1),  # step 3, whose scores are known
        Call(f"{ONLINE}:_score_and_pair", 2),  # step 4
        Call("rlxf.score.reward_model:RewardModelScorer.score", 1, after=True),
        Call(f"{REFERENCE}.logps", 1),  # step 4: what the reference said of step 3 is known
        Call(f"{RECORDER}", 1, after=True),
        Call(f"{MODEL}.step", 1, after=True),  # between the two optimizer steps of step 3
        Call(f"{ONLINE}:_sample", 2, after=True),  # step 5, beside the update of step 4
    )


def test_killed_at_a_boundary(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call(f"{ACTOR}:MegatronActor.update", 2, after=True),  # before the push
        Call(f"{ENGINE}.load_bucket", 2),  # in the middle of it: one came before
        Call(f"{REFERENCE}.mix", 1),  # before the move
        Call(f"{REFERENCE}.mix", 1, after=True),
        File("open", "*/waiting/0000002.json"),  # its tensors are there
        Call(f"{BUILD}:save_waiting", after=True),
        File("open", "*/.driver.json.tmp"),
        Call(f"{FOLDER}:write_manifest", after=True),
        File("rename", "*/iter_0000002"),
        File("rename", "*/latest_checkpointed_iteration.txt"),
        Call(EVALUATION, 1),
        Call(ROW, 1, after=True),
        File("rename", "*/hf_0000003"),
        File("rename", "*/.iter_0000002.*.old"),
        File("rename", "*/policy"),
        File("open", "*/.summary.json.tmp"),
    )


@pytest.mark.slow
def test_stopped_by_sigterm_in_every_state(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    """``assert_survives`` sees after each that all complete steps are saved."""
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call(f"{MODEL}.step", 2, signal=TERM),  # the update of step 1 ends
        Call(f"{ONLINE}:_sample", 1, signal=TERM),  # drops step 3
        Call(f"{ENGINE}.generate", 1, after=True, signal=TERM),
        Call(f"{ONLINE}:_score_and_pair", 2, signal=TERM),  # step 3 is sampled, not scored
        Call(f"{REFERENCE}.logps", 1, signal=TERM),  # and now it is scored, from what was saved
        Call(RECORDER, 1, signal=TERM),
        Call(f"{REFERENCE}.mix", 1, signal=TERM),  # the move after step 2 ends
        Call(EVALUATION, 1, signal=TERM),  # drops the evaluation after step 3
        Call(EVALUATION, 1, signal=TERM),  # which is made up for
        Call(f"{ACTOR}:MegatronActor.save_hf", 1, signal=TERM),
        Call(f"{FOLDER}:write_manifest", 1, signal=TERM),  # the checkpoint after step 4 is complete
        Call(f"{ENGINE}.load_bucket", 2, signal=TERM),  # the push after step 5 ends
    )


@pytest.mark.slow
def test_four_steps_ahead(four: Recipe, undisturbed_four: Finished, tmp_path: Path) -> None:
    assert_survives(
        four,
        tmp_path / "run",
        undisturbed_four,
        Call(f"{ONLINE}:_sample", 4),  # at the start
        Call(f"{MODEL}.step", 2, signal=TERM),  # of step 1; saves it with four steps that wait
        Call(f"{ONLINE}:_sample", 1),  # step 6, the last one that is sampled, beside the update of step 2
        Call(f"{REFERENCE}.logps", 1, signal=TERM),  # the same
        Call(f"{MODEL}.step", 1, signal=TERM),  # of step 2; five steps wait
        Call(f"{MODEL}.step", 3),  # of step 4
        Call(f"{REFERENCE}.mix", 1, after=True),
        File("open", "*/waiting/0000005.json"),  # the second of two, after step 4
        Call(f"{MODEL}.step", 4, after=True),  # of the last step, after which nothing waits
    )


def test_steps_that_wait_are_in_every_checkpoint_but_the_last(undisturbed_four: Finished) -> None:
    four, six = list_checkpoints(undisturbed_four.folder / "checkpoints")
    waiting = load_waiting(four)
    assert [(item.step, item.sampled_at, item.version) for item in waiting] == [(4, 0, 0), (5, 1, 1)]
    assert all(item.raw_scores is not None and item.reference is not None for item in waiting)
    assert not (four / "pushed").exists()  # nothing was being sampled
    assert not (six / "waiting").exists()


@pytest.mark.slow
def test_in_the_background_too(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    background = copy.deepcopy(recipe)
    background["training"]["async_save"] = True
    assert_survives(
        background,
        tmp_path / "run",
        undisturbed,
        File("open", "*/waiting/0000002.json"),
        Call(f"{FOLDER}:publish"),
        Call(f"{FOLDER}:publish", signal=TERM),  # ends with all of it written
        Call(f"{MODEL}.step", 2),
    )


@pytest.mark.parametrize("name", ["0000004.json", pytest.param("0000004.safetensors", marks=pytest.mark.slow)])
def test_a_damaged_step_that_waits_is_seen_and_the_checkpoint_before_is_taken(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    assert run_in_child(recipe, run_dir, Call(f"{ACTOR}:MegatronActor.update", 5)).code == -signal.SIGKILL
    two, four = list_checkpoints(run_dir / "checkpoints")
    flip_one_bit(four / "waiting" / name)
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    assert f"damaged checkpoint: {four}: waiting/{name}" in ended.output
    assert f"resumed from {two}" in ended.output
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lookahead", [1, 4])
def test_killed_at_random_moments(lookahead: int, seed: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe, undisturbed = (
        request.getfixturevalue(name)
        for name in {1: ("recipe", "undisturbed"), 4: ("four", "undisturbed_four")}[lookahead]
    )
    assert_survives_random_kills(recipe, tmp_path / "run", undisturbed, seed)
