"""``rollout.lookahead``: each step trains on what the policy of that many steps before sampled, and the run repeats."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from rlxf.observe.formulas import read_jsonl
from tests.runs.killed import Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Finished, Recipe, World, replay_of, run
from tests.runs.test_repeat import LIVE_ONLY, same_weights, without

STEPS = 6
UPDATE = "rlxf.update.actor:MegatronActor.update"


def recipe_of(world: World, lookahead: int = 1, **changes: dict[str, Any]) -> Recipe:
    base = world.recipe(
        training={"train_iters": STEPS, "save_interval": 2, "eval_interval": 3},
        actor_rollout={"ppo_mini_batch_size": 2},
        rollout={"lookahead": lookahead},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 2},
    )
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
    return base


@pytest.fixture(scope="module")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One step ahead."""
    return run(recipe_of(world), tmp_path_factory.mktemp("runs") / "one")


def versions(finished: Finished) -> list[int]:
    """Of each step."""
    found: dict[int, set[int]] = {}
    for row in finished.rollouts:
        found.setdefault(row["step"], set()).add(row["policy_version"])
    assert all(len(of_step) == 1 for of_step in found.values())  # nothing is of mixed versions
    return [version for step in sorted(found) for version in found[step]]


def same_training(mine: Finished, theirs: Finished) -> None:
    """Every number but those of evaluations, every rollout and weight."""
    assert without(mine.numbers, ("eval/",)) == without(theirs.numbers, ("eval/",))
    assert mine.rollouts == theirs.rollouts
    assert same_weights(mine, theirs)


def killed_and_resumed(recipe: Recipe, folder: Path, update: int = 4) -> Finished:
    """The undisturbed run; the same run, killed in an update after its first checkpoint and resumed, is compared."""
    whole = undisturbed_run(recipe, folder / "whole")
    ended = run_in_child(recipe, folder / "run", Call(UPDATE, update))
    assert ended.code == -signal.SIGKILL, ended.output
    assert load_waiting(list_checkpoints(folder / "run" / "checkpoints")[-1])
    ended = run_in_child(recipe, folder / "run")
    assert ended.code == 0, ended.output
    assert "resumed from" in ended.output
    assert_same_run(folder / "run", whole)
    return whole


@pytest.mark.parametrize("lookahead", [1, 4])
def test_each_step_is_sampled_by_the_policy_of_so_many_steps_before(
    world: World, tmp_path: Path, lookahead: int
) -> None:
    done = run(recipe_of(world, lookahead, training={"train_iters": 8}), tmp_path / "run")
    assert versions(done) == [max(0, step - lookahead) for step in range(8)]
    lags = [row["sync/version_lag"] for row in done.rows]
    assert lags == [min(step, lookahead) for step in range(8)]


def test_two_runs_are_equal_bit_for_bit(world: World, one: Finished, tmp_path: Path) -> None:
    again = run(recipe_of(world), tmp_path / "again")
    assert_same_run(again.folder, one)
    assert one.losses != run(recipe_of(world, 0), tmp_path / "zero").losses


def test_checkpoints_and_evaluations_in_between_change_nothing(world: World, one: Finished, tmp_path: Path) -> None:
    without_any = recipe_of(world, training={"save_interval": 0, "eval_interval": 0})
    same_training(run(without_any, tmp_path / "run"), one)


def test_steps_that_wait_are_not_sampled_beyond_the_last(world: World, tmp_path: Path) -> None:
    """More steps ahead than the run has."""
    done = run(recipe_of(world, 16, training={"train_iters": 3, "eval_interval": 0}), tmp_path / "run")
    assert versions(done) == [0, 0, 0]
    assert not (list_checkpoints(done.folder / "checkpoints")[-1] / "waiting").exists()


@pytest.mark.slow
def test_a_step_keeps_the_reference_that_stood_when_it_was_sampled(world: World, tmp_path: Path) -> None:
    """A reference that becomes the policy after every step: at lookahead 0 both are the same when a step is trained."""
    frozen = {"training": {"train_iters": 3}, "actor_rollout": {"ppo_mini_batch_size": 4}}
    moving = {**frozen, "ref": {"ref_update_interval": 1, "ref_mixup_alpha": 1.0}}
    runs = [
        run(recipe_of(world, lookahead, **changes), tmp_path / f"{name}{lookahead}")
        for name, changes in (("frozen", frozen), ("moving", moving))
        for lookahead in (0, 1)
    ]
    frozen_zero, frozen_one, moving_zero, moving_one = (done.losses for done in runs)
    assert moving_zero == pytest.approx([math.log(2)] * 3, abs=1e-4)
    # The second step was sampled and referenced before the first move; the third after it.
    assert moving_one[:2] == frozen_one[:2]
    assert moving_one[2] != frozen_one[2]
    assert frozen_zero[1:] != moving_zero[1:]


@pytest.mark.slow  # beside kills: test_lookahead_kill.py
def test_a_moving_reference_goes_on(world: World, tmp_path: Path) -> None:
    killed_and_resumed(recipe_of(world, ref={"ref_update_interval": 2}), tmp_path)


@pytest.mark.slow
def test_adapters_go_on(world: World, tmp_path: Path) -> None:
    """Their reference is the actor, which answers when a step's turn has come."""
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "lr": 1e-2}
    recipe = recipe_of(world, actor_rollout=lora)
    whole = killed_and_resumed(recipe, tmp_path)
    assert versions(whole) == [0, 0, 1, 2, 3, 4]
    (waiting,) = load_waiting(list_checkpoints(whole.folder / "checkpoints")[0])
    assert waiting.reference is None


TIES = """
def reward(prompts, completions, completion_ids, **columns):
    step = min(columns["number"]) // 4  # prompts come in file order, four a step
    return [0.0 if step == 1 else float(sum(ids) % 7) for ids in completion_ids]
"""


def test_tied_steps_make_no_version_and_go_on(world: World, tmp_path: Path) -> None:
    """The second and the fifth step give no pair."""
    recipe = recipe_of(
        world, actor_rollout={"no_shuffle": True}, reward=world.reward_function(tmp_path, TIES),
        algorithm={"max_empty_steps": 2},
    )  # fmt: skip
    whole = killed_and_resumed(recipe, tmp_path, update=3)
    assert ["loss" in row for row in whole.rows] == [True, False, True, True, False, True]
    assert versions(whole) == [0, 0, 1, 1, 2, 3]


@pytest.mark.slow
def test_too_many_tied_steps_end_the_run_and_are_trained_with_a_higher_limit(world: World, tmp_path: Path) -> None:
    code = TIES.replace("step == 1", "step in (1, 2)")
    ties = recipe_of(world, actor_rollout={"no_shuffle": True}, reward=world.reward_function(tmp_path, code))
    higher, lower = ({**ties, "algorithm": {"max_empty_steps": limit}} for limit in (3, 2))
    whole = undisturbed_run(higher, tmp_path / "whole")
    ended = run_in_child(lower, tmp_path / "run")
    assert ended.code == 1
    assert "step 3: 2 steps in a row gave no pair" in ended.output
    assert run_in_child(higher, tmp_path / "run").code == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_replay_at_the_same_lookahead_gives_the_same_bits(world: World, one: Finished, tmp_path: Path) -> None:
    recipe = replay_of(recipe_of(world), one.folder / "rollouts.jsonl")
    recipe["training"]["eval_interval"] = 0
    whole = killed_and_resumed(recipe, tmp_path)
    live = without(one.numbers, (*LIVE_ONLY, "eval/"))
    assert without(whole.numbers, LIVE_ONLY) == live
    assert same_weights(whole, one)
    assert whole.sampled == one.sampled


def test_a_checkpoint_with_steps_that_wait_is_evaluated_as_the_run_did(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(world, training={"train_iters": 4, "eval_interval": 2})
    trained = run(recipe, tmp_path / "run")
    checkpoint = trained.folder / "checkpoints" / "iter_0000002"
    assert load_waiting(checkpoint)
    evaluated = {"eval_only": True, "resume": str(checkpoint)}
    done = run(recipe_of(world, training={"train_iters": 4, "eval_interval": 2, **evaluated}), tmp_path / "evaluated")
    (now,) = read_jsonl(done.folder / "eval.jsonl")
    then = next(row for row in read_jsonl(trained.folder / "eval.jsonl") if row["step"] == 2)
    assert now == {name: value for name, value in then.items() if "previous" not in name}
    assert load_waiting(checkpoint)


@pytest.mark.slow
def test_checkpoints_by_the_clock_hold_what_waits_too(world: World, tmp_path: Path) -> None:
    """``training.save_every_minutes``; a step of the same run replaces them."""
    often = recipe_of(world, training={"save_interval": 0, "save_every_minutes": 1e-4})
    whole = undisturbed_run(often, tmp_path / "whole")
    ended = run_in_child(often, tmp_path / "run", Call(UPDATE, 4))
    assert ended.code == -signal.SIGKILL
    (newest,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.name == "iter_0000003"
    assert [item.step for item in load_waiting(newest)] == [3]
    assert run_in_child(often, tmp_path / "run").code == 0
    assert_same_run(tmp_path / "run", whole)
