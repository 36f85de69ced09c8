"""A run that is killed, at any moment, and started again is the undisturbed run: every number, prompt, pair, weight.

Real ``kill -9`` and signals, in processes of their own (``tests/runs/killed.py``). A chain kills one run several times:
each time it goes on from where the last one left it.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.store import list_checkpoints, newest_good, step_of
from tests.damage import DAMAGES, flip_one_bit
from tests.runs.killed import After, Call, File, Moment, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import NUM_PROMPTS, Finished, Recipe, World

STEPS = 6
ACTOR, OPTIMIZER, FOLDER = "rlxf.update.actor", "rlxf.models.megatron.optimizer", "rlxf.checkpointing.run_folder"


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    """An epoch is three steps, a step two optimizer steps; checkpoints, evaluations and Hugging Face folders."""
    return world.recipe(
        training={
            "train_iters": STEPS, "save_interval": 2, "keep_latest": 2, "eval_interval": 3, "save_hf_interval": 3
        },
        actor_rollout={"ppo_mini_batch_size": 2, "shuffle_minibatch": True, "lr_decay_style": "cosine"},
        eval={"num_prompts": 4},
        log={"rollouts": True, "samples_interval": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return undisturbed_run(recipe, tmp_path_factory.mktemp("runs") / "undisturbed")


def assert_survives(recipe: Recipe, run_dir: Path, undisturbed: Finished, *moments: Moment) -> None:
    """Kill the run at each moment in turn, let it end, and compare."""
    for moment in moments:
        ended = run_in_child(recipe, run_dir, moment)
        assert ended.code in (-signal.SIGKILL, 128 + signal.SIGTERM), f"{moment} did not come\n{ended.output}"
        assert "Traceback" not in ended.output
        if ended.code > 0:  # a signal that asks: every complete step is saved
            newest = list_checkpoints(run_dir / "checkpoints")[-1]
            assert step_of(newest) == Finished(run_dir).rows[-1]["step"], f"{moment}\n{ended.output}"
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    assert "damaged" not in ended.output  # a killed save leaves the checkpoint before it, and no half of the new one
    assert_same_run(run_dir, undisturbed)
    rows = Finished(run_dir).rollouts
    for epoch in (rows[:NUM_PROMPTS], rows[NUM_PROMPTS:]):  # no prompt is skipped, and none comes twice
        assert list(Counter(tuple(row["prompt_ids"]) for row in epoch).values()) == [1] * NUM_PROMPTS
    assert not list(run_dir.glob(".*"))
    left = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".") and name != ".lock"]
    assert {"hf_0000003", "hf_0000006", "iter_0000006"} <= set(left)
    assert len([name for name in left if name.startswith("iter_")]) == 2  # training.keep_latest


def test_killed_around_optimizer_steps(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call("rlxf.rollout.hf:HfEngine.generate", 2),  # before the first checkpoint: begins again
        Call(f"{OPTIMIZER}:TrainableModel.step", 5),  # before an optimizer step
        Call(f"{OPTIMIZER}:TrainableModel.step", 1, after=True),  # between the two of a step
        Call(f"{OPTIMIZER}:TrainableModel.accumulate", 2, after=True),  # gradients are there
        Call("torch:_fused_adamw_", 2, after=True),  # inside the second one
        Call(f"{ACTOR}:MegatronActor.update", 2, after=True),  # after it, before the sync
        Call("rlxf.rollout.hf:HfEngine.load_bucket", 2),  # in the middle of a sync
    )


def test_killed_inside_a_save_and_at_the_end(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        File("open", "*.distcp", 2),  # one of its shards is there
        File("open", "*/.driver.json.tmp"),
        Call(f"{FOLDER}:write_manifest", after=True),  # everything is there but its name
        File("rename", "*/iter_0000002"),
        File("rename", "*/latest_checkpointed_iteration.txt"),  # it has its name, and the tracker does not know it
        File("rename", "*/hf_0000003"),
        File("rename", "*/.iter_0000002.*.old"),  # two newer ones are whole, this one is about to go
        File("rename", "*/policy"),  # the last checkpoint is there, the policy is not
        File("open", "*/.summary.json.tmp"),
    )


@pytest.mark.slow
def test_stopped_by_sigterm_in_the_middle_of_anything(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    term = signal.SIGTERM
    assert_survives(
        recipe,
        tmp_path / "run",
        undisturbed,
        Call(f"{OPTIMIZER}:TrainableModel.step", 2, signal=term),  # lets step 1 end, and saves it
        Call("rlxf.rollout.hf:HfEngine.generate", 2, signal=term),  # drops step 3
        Call("rlxf.evaluate:Evaluation._sample", signal=term),  # drops the evaluation after step 3
        Call("rlxf.evaluate:Evaluation._sample", signal=term),  # which is made up for before step 4
        Call(f"{FOLDER}:write_manifest", signal=term),  # lets the checkpoint after step 4 be complete
        Call("rlxf.reference.frozen:FrozenReference.logps", signal=term),
    )


@pytest.mark.slow
def test_in_the_background_too(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    background = {**recipe, "training": {**recipe["training"], "async_save": True}}
    assert_survives(
        background,
        tmp_path / "run",
        undisturbed,
        File("open", "*.distcp", 2),
        Call(f"{FOLDER}:publish"),
        Call(f"{FOLDER}:publish", signal=signal.SIGTERM),  # ends with all of it written
        Call(f"{OPTIMIZER}:TrainableModel.step", 2),
    )


@pytest.mark.slow
def test_adapters_and_their_dropout_go_on_too(recipe: Recipe, tmp_path: Path) -> None:
    """Dropout is keyed by the step, as sampling is."""
    adapters = {**recipe["actor_rollout"], "lora_r": 4, "lora_dropout": 0.2, "lr": 1e-2}
    lora = {**recipe, "actor_rollout": adapters}
    ended = run_in_child(lora, tmp_path / "whole")
    assert ended.code == 0, ended.output
    moments = Call(f"{OPTIMIZER}:TrainableModel.step", 6), Call(f"{ACTOR}:MegatronActor.update", 2, after=True)
    assert_survives(lora, tmp_path / "run", Finished(tmp_path / "whole"), *moments)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_seen_and_the_checkpoint_before_is_taken(
    undisturbed: Finished, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good, newest = list_checkpoints(undisturbed.folder / "checkpoints")
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "driver.json", "layout.json"} <= set(names)
    root = tmp_path / "checkpoints"
    shutil.copytree(good, root / good.name)
    for name in names:
        shutil.copytree(newest, root / newest.name)
        assert newest_good(root) == (root / newest.name, [])
        damage(root / newest.name / name)
        found, damaged = newest_good(root)
        assert found == root / good.name
        assert [item.folder.name for item in damaged] == [newest.name], name
        shutil.rmtree(root / newest.name)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    recipe: Recipe, undisturbed: Finished, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run_in_child(recipe, run_dir, Call(f"{ACTOR}:MegatronActor.update", 5)).code == -signal.SIGKILL
    two, four = list_checkpoints(run_dir / "checkpoints")
    flip_one_bit(four / "__0_1.distcp")
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    assert f"damaged checkpoint: {four}: __0_1.distcp" in ended.output
    assert f"resumed from {two}" in ended.output
    assert_same_run(run_dir, undisturbed)
    assert find_problems(four) == []  # replaced when the run came by again


def test_when_none_is_whole_the_run_does_not_begin_again(recipe: Recipe, undisturbed: Finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_in_child(recipe, run_dir, Call(f"{ACTOR}:MegatronActor.update", 5)).code == -signal.SIGKILL
    for folder in list_checkpoints(run_dir / "checkpoints"):
        (folder / ".metadata").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 4
    assert ended.output.count("missing") == 2
    assert "training.resume=never" in ended.output
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(recipe: Recipe, undisturbed: Finished, tmp_path: Path, seed: int) -> None:
    assert_survives_random_kills(recipe, tmp_path / "run", undisturbed, seed)


def assert_survives_random_kills(recipe: Recipe, run_dir: Path, undisturbed: Finished, seed: int) -> None:
    """Killed at up to four random moments, each time after it went on, and then to its end."""
    draw = random.Random(seed)
    for _ in range(4):
        ended = run_in_child(recipe, run_dir, After(draw.uniform(0.2, 2.0)))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.output
    assert_survives(recipe, run_dir, undisturbed)
