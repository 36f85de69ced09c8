"""Whatever ends a run on Ray, its last complete step is saved, and what goes on is the run without that fault.

The runs that go on are in one process: for the same engine the numbers are the same, and it starts in seconds.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from rlxf.checkpointing.store import list_checkpoints, step_of
from tests.cluster.conftest import Recipe, command_of, end_run
from tests.cluster.test_launch import leftovers, numbers, succeed, wait_until
from tests.cluster.test_resume import weights

pytestmark = pytest.mark.cluster

STEPS = 60
# What a lost worker does without recovery: test_recovery.py has the rest.
LONG = (f"training.train_iters={STEPS}", "log.tensorboard=false", "resilience.max_recoveries=0")
FUNCTION = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def reward(prompts, completions, completion_ids, **columns):
    time.sleep(0.1)  # so that something can happen before the run is over
    while (HERE / "hold").exists():
        (HERE / "held").touch()
        time.sleep(0.05)
    if (HERE / "down").exists():
        raise RuntimeError("the service is down")
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def scored(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides: a reward function that raises while the file ``down`` is beside it, and waits while ``hold`` is."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "reward.py").write_text(FUNCTION)
    return (*LONG, "reward.load=null", "reward.model=null", f"reward.function={folder / 'reward.py'}")


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, scored: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(recipe.run(run_dir, *scored, "runtime=local"))
    return run_dir


@contextmanager
def started(recipe: Recipe, run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run on Ray with three complete steps; nothing of it is left afterwards."""
    process = subprocess.Popen(
        recipe.command(run_dir, *overrides),
        env=recipe.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    try:
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), 180
        )
        assert process.poll() is None, process.communicate()[0]
        family = recipe.family(process)
        yield process
        assert not [name for name in leftovers(family) if "Worker" in name]
    finally:
        end_run(process)


def worker(recipe: Recipe, process: subprocess.Popen[str], kind: str) -> psutil.Process:
    """Ray names a worker process by its class."""
    return next(member for member in recipe.family(process) if f"ray::{kind}" in command_of(member))


def assert_goes_on(recipe: Recipe, run_dir: Path, undisturbed: Path, output: str, *overrides: str) -> None:
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    step = step_of(newest)
    assert f"saved: {step} of {STEPS} steps, {newest}\n" in output
    assert re.search(rf"^to go on: python ray_gpt\.py .* hydra\.run\.dir={run_dir}$", output, re.M)
    assert numbers(run_dir)[-1]["step"] == step
    succeed(recipe.run(run_dir, *overrides, "runtime=local"))
    assert numbers(run_dir) == numbers(undisturbed)
    mine, theirs = weights(run_dir), weights(undisturbed)
    assert all(mine[name].equal(value) for name, value in theirs.items())


@pytest.mark.parametrize(
    "kind",
    ["RolloutWorker", pytest.param("ReferenceWorker", marks=pytest.mark.slow)],  # reward workers: test_lookahead.py
)
def test_a_lost_worker_costs_no_complete_step(
    recipe: Recipe, scored: tuple[str, ...], undisturbed: Path, tmp_path: Path, kind: str
) -> None:
    with started(recipe, tmp_path, *scored) as process:
        worker(recipe, process, kind).kill()
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 1
    assert "lost " in output
    assert_goes_on(recipe, tmp_path, undisturbed, output, *scored)


@pytest.mark.slow
def test_a_stuck_engine_costs_no_complete_step(
    recipe: Recipe, scored: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    with started(recipe, tmp_path, *scored, "training.stage_timeout_s=5") as process:
        worker(recipe, process, "RolloutWorker").send_signal(signal.SIGSTOP)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 1
    assert "infer rank 0" in output
    assert "hangs: no answer within training.stage_timeout_s = 5 s; it is ended" in output
    assert_goes_on(recipe, tmp_path, undisturbed, output, *scored)


def test_a_reward_function_that_raises_costs_no_complete_step(
    recipe: Recipe, scored: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    down = reward_folder(scored) / "down"
    with started(recipe, tmp_path, *scored) as process:
        down.touch()
        output = process.communicate(timeout=60)[0]
        down.unlink()
        assert process.returncode != 0
    assert "the service is down" in output
    assert_goes_on(recipe, tmp_path, undisturbed, output, *scored)


def reward_folder(overrides: Iterable[str]) -> Path:
    return next(Path(item.split("=")[1]).parent for item in overrides if item.startswith("reward.function="))


def stuck_update(recipe: Recipe, run_dir: Path, then: Callable[[subprocess.Popen[str]], None], *overrides: str) -> str:
    """The output of a run whose trainer is stopped for good while a step is being scored, and ``then`` is done."""
    folder = reward_folder(overrides)
    hold, held = folder / "hold", folder / "held"
    held.unlink(missing_ok=True)
    with started(recipe, run_dir, *overrides) as process:
        hold.touch()
        wait_until(held.exists, 60)
        worker(recipe, process, "ActorWorker").send_signal(signal.SIGSTOP)
        hold.unlink()
        time.sleep(2)  # pairing takes milliseconds: the driver waits for the update now
        then(process)
        return process.communicate(timeout=90)[0]


@pytest.mark.slow
def test_an_update_that_a_stop_cuts_saves_nothing_and_names_the_checkpoint_before(
    recipe: Recipe, scored: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (*scored, "training.save_interval=2", "training.stop_grace_s=2")
    output = stuck_update(recipe, tmp_path, lambda process: process.send_signal(signal.SIGTERM), *overrides)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert "stopped while waiting for update of train rank 0" in output
    assert re.search(
        r"not saved: the update of step \d+ took longer than training.stop_grace_s = 2 and was stopped", output
    )
    assert f"the newest checkpoint is {newest}\n" in output
    assert "to go on: python ray_gpt.py" in output


@pytest.mark.slow
def test_a_stuck_trainer_is_not_waited_for_again(recipe: Recipe, scored: tuple[str, ...], tmp_path: Path) -> None:
    output = stuck_update(recipe, tmp_path, lambda process: None, *scored, "training.stage_timeout_s=5")
    assert re.search(r"train rank 0 on node .* hangs: no answer within training.stage_timeout_s = 5 s", output), output
    assert "not saved: the actor is lost or does not answer" in output
    assert list_checkpoints(tmp_path / "checkpoints") == []
