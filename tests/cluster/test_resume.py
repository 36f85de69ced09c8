"""Real kills of a run on Ray: what is started again goes on, bit for bit in the same layout."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlxf.checkpointing.store import list_checkpoints
from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Recipe, command_of
from tests.cluster.test_launch import leftovers, numbers, succeed, wait_until

pytestmark = pytest.mark.cluster

STEPS = 60
LONG = (
    *(f"training.train_iters={STEPS}", "training.save_interval=4", "training.keep_latest=2", "log.tensorboard=false"),
    "resilience.max_recoveries=0",
)


def die(recipe: Recipe, run_dir: Path, victim: Callable[[psutil.Process], bool], *overrides: str) -> tuple[int, str]:
    """Exit code and output of a run that loses the process that ``victim`` chooses, after its first checkpoint."""
    process = subprocess.Popen(
        recipe.command(run_dir, *recipe.offline, *LONG, *overrides),
        env=recipe.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: bool(list_checkpoints(run_dir / "checkpoints")) or process.poll() is not None, 180)
    assert process.poll() is None, process.communicate()[0]
    family = [psutil.Process(process.pid), *recipe.family(process)]
    next(member for member in family if victim(member)).kill()
    output = process.communicate(timeout=60)[0]
    left = leftovers([member for member in family if member.pid != process.pid])
    assert not [name for name in left if "Worker" in name]  # after a driver's death Ray's own agents take a minute
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) < STEPS
    return process.returncode, output


def is_trainer(rank: int) -> Callable[[psutil.Process], bool]:
    """Ray names a worker process by its class; ranks start in order."""
    seen: list[int] = []

    def found(process: psutil.Process) -> bool:
        if "ActorWorker" in command_of(process):
            seen.append(process.pid)
        return len(seen) == rank + 1

    return found


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(run_dir / "policy" / "model.safetensors")
    return loaded


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert numbers(run_dir) == numbers(undisturbed)
    mine, theirs = weights(run_dir), weights(undisturbed)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(value) for name, value in theirs.items())


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(recipe.run(run_dir, *recipe.offline, *LONG, "runtime=local"))
    return run_dir


def test_a_killed_trainer_rank_ends_the_run_and_the_next_one_goes_on(
    recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    code, output = die(recipe, tmp_path, is_trainer(0))
    assert code == 1
    assert "lost train rank 0" in output
    text = succeed(recipe.run(tmp_path, *recipe.offline, *LONG))
    assert "INFO: resumed from" in text
    assert "train rank 0, ref rank 0" in text  # offline: neither rollout nor reward workers
    assert len({row["loss"] for row in numbers(tmp_path)}) > STEPS / 2
    assert_same(tmp_path, undisturbed)


def test_a_killed_driver_leaves_a_run_that_goes_on(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    background = "training.async_save=true"
    code, _ = die(recipe, tmp_path, lambda process: True, background)  # the first of the family is the driver
    assert code == -9
    succeed(recipe.run(tmp_path, *recipe.offline, *LONG, background))
    assert_same(tmp_path, undisturbed)


def test_two_trainer_ranks_lose_one_and_one_rank_takes_over(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """The pairs of an optimizer step stay the same: half as many on each of twice the ranks."""
    two = ("actor_rollout.num_gpus_for_train=2", "resource_pool.actor_rollout=2", "actor_rollout.ppo_mini_batch_size=2")
    code, output = die(recipe, tmp_path, is_trainer(1), *two)
    assert code == 1
    assert "lost train rank" in output
    text = succeed(recipe.run(tmp_path, *recipe.offline, *LONG))
    assert "the layout has changed since" in text
    assert "the recipe has changed" not in text
    for mine, theirs in zip(numbers(tmp_path), numbers(undisturbed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))
