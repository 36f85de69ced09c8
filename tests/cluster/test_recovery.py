"""Workers that are lost or hang are started again, and the run's numbers are those of the run that lost nobody.

Faults come at chosen calls of chosen methods (``faults.py``). The undisturbed runs have the same engines, so the bits
are the same; where there is one engine they are in one process, which starts in seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Cluster, Recipe, children, cluster, command_of
from tests.cluster.faults import Fault, happened, run
from tests.cluster.network import cable
from tests.cluster.test_launch import numbers, succeed
from tests.cluster.test_resume import weights

pytestmark = pytest.mark.cluster

COMMON = (
    *("training.train_iters=10", "training.save_interval=3", "log.rollouts=true", "resilience.max_recoveries=20"),
    *("resilience.min_deadline_s=5", "training.eval_interval=5", "eval.num_prompts=2"),
)
HEALTH_CHECK = {  # of scripts/cluster_up.sh
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
TWO_ENGINES = ("resource_pool.actor_rollout=3", "actor_rollout.num_gpus_for_infer=2")


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run without a fault, made once; with two engines on Ray."""
    return made_once(recipe, tmp_path_factory.mktemp("undisturbed"), COMMON)


def made_once(recipe: Recipe, folder: Path, common: Sequence[str]) -> Callable[..., Path]:
    """Runs without a fault: with two engines on Ray, else in one process."""
    made = dict[tuple[str, ...], Path]()

    def found(*overrides: str) -> Path:
        if overrides not in made:
            run_dir = folder / f"run{len(made)}"
            runtime = () if any("resource_pool" in key for key in overrides) else ("runtime=local",)
            succeed(recipe.run(run_dir, *common, *overrides, *runtime))
            assert not (run_dir / "events.jsonl").exists()
            made[overrides] = run_dir
        return made[overrides]

    return found


def faulty(
    recipe: Recipe, tmp_path: Path, faults: Sequence[Fault], *overrides: str, code: int = 0, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """The run with these faults, all of which have come; its folder is ``tmp_path / "run"``."""
    command = recipe.command(tmp_path / "run", *COMMON, *overrides)
    done = run(command, tmp_path / "plan", faults, recipe.env, timeout_s)
    assert done.returncode == code, done.stdout + done.stderr
    assert happened(tmp_path / "plan") == len(faults), done.stderr
    assert "Traceback" not in done.stderr
    return done


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run_dir / "events.jsonl") if row["event"] in kinds]


def without_shares(run_dir: Path) -> list[dict[str, Any]]:
    """But for who sampled how much: others take over what a lost engine was sampling."""
    return [{name: value for name, value in row.items() if name != "rollout/imbalance"} for row in numbers(run_dir)]


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert without_shares(run_dir) == without_shares(undisturbed)
    for name in ("rollouts.jsonl", "eval.jsonl", "samples.jsonl"):
        mine, theirs = run_dir / name, undisturbed / name
        assert mine.exists() == theirs.exists(), name
        assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), name
    found, expected = weights(run_dir), weights(undisturbed)
    assert all(found[name].equal(value) for name, value in expected.items())


# Every role in each of its phases; several losses in one run, as in life.
STATELESS = (
    Fault(role="infer", method="generate", call=1),  # of the first evaluation
    Fault(role="infer", method="generate", call=7, after=True),
    Fault(role="infer", method="receive", call=7),
    Fault(role="infer", method="end_update", call=11),
    Fault(role="infer", method="begin_update", call=14),
    Fault(role="ref", method="logps", call=2),
    Fault(role="ref", method="logps", call=6, after=True),
    Fault(role="reward", method="score", call=4),
    Fault(role="reward", method="score", call=9, after=True),
)
TRAINER = (
    Fault(role="train", method="update", call=2),  # before the first checkpoint: it begins anew
    Fault(role="train", method="update", call=6, after=True),
    Fault(role="train", method="send_bucket", call=12),
    Fault(role="train", method="save_checkpoint", call=3),
)

EVERY_ROLE = (
    Fault(role="infer", method="generate", call=4),
    Fault(role="reward", method="score", call=4, how="stop"),
    Fault(role="train", method="update", call=5),
    Fault(role="ref", method="logps", call=9, after=True),
)


@pytest.mark.timeout(600)
def test_every_role_is_lost_in_one_run_and_no_number_changes(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed and stopped ones in one run; each alone below."""
    faulty(recipe, tmp_path, EVERY_ROLE, "rollout.lookahead=1")
    assert_same(tmp_path / "run", undisturbed("rollout.lookahead=1"))
    # At least: on a busy machine a worker may be silent for the five seconds without having been stopped.
    assert len(events(tmp_path / "run", "recovered")) >= 3
    assert len(events(tmp_path / "run", "rebuilt")) >= 1
    assert len(events(tmp_path / "run", "hung")) >= 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_stateless_workers_come_back_and_no_step_is_lost(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int
) -> None:
    ahead = f"rollout.lookahead={lookahead}"
    faulty(recipe, tmp_path, STATELESS, ahead)
    assert_same(tmp_path / "run", undisturbed(ahead))
    back = events(tmp_path / "run", "recovered")
    assert len(events(tmp_path / "run", "lost")) == len(back) == len(STATELESS)
    assert all(row["steps_lost"] == 0 and row["seconds"] < 30 for row in back)
    assert not events(tmp_path / "run", "rebuilt")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_lost_trainer_is_rebuilt_from_the_last_checkpoint(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int
) -> None:
    ahead = f"rollout.lookahead={lookahead}"
    faulty(recipe, tmp_path, TRAINER, ahead)
    assert_same(tmp_path / "run", undisturbed(ahead))
    rebuilt = events(tmp_path / "run", "rebuilt")
    assert len(rebuilt) == len(TRAINER)
    assert all(row["steps_lost"] <= 3 for row in rebuilt)
    assert rebuilt[0]["steps_lost"] == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("lookahead", "how"), [(0, "stop"), (1, "stop"), (1, "hang")])
def test_hung_workers_are_noticed_and_replaced(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int, how: Any
) -> None:
    ahead = f"rollout.lookahead={lookahead}"
    faults = (
        Fault(role="infer", method="generate", call=8, how=how),
        Fault(role="ref", method="logps", call=4, how=how),
        Fault(role="reward", method="score", call=11, how=how),
        Fault(role="train", method="update", call=8, how=how),
    )
    faulty(recipe, tmp_path, faults, ahead)
    assert_same(tmp_path / "run", undisturbed(ahead))
    assert len(events(tmp_path / "run", "hung")) >= len(faults)
    stacks = list((tmp_path / "run" / "stacks").glob("*.txt")) if how == "hang" else []
    where = [path for path in stacks if "happen (tests/cluster/faults.py" in path.read_text()]
    assert len(where) == (len(faults) if how == "hang" else 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_another_engine_takes_over_what_a_lost_one_was_sampling(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int
) -> None:
    overrides = (*TWO_ENGINES, f"rollout.lookahead={lookahead}")
    faults = (
        Fault(role="infer", rank=1, method="generate", call=8),
        Fault(role="infer", rank=0, method="generate", call=12, after=True),
        Fault(role="infer", rank=1, method="receive", call=9),
    )
    faulty(recipe, tmp_path, faults, *overrides)
    assert_same(tmp_path / "run", undisturbed(*overrides))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_lost_vllm_engine_samples_again_from_the_weights_that_are_due(
    recipe: Recipe, tmp_path: Path, lookahead: int
) -> None:
    """Its log-probs are those of the trainer's weights, and one process that replays its samples gets the losses."""
    ahead = f"rollout.lookahead={lookahead}"
    faults = (  # each start of vLLM takes twenty seconds on quiet cores
        Fault(role="infer", method="generate", call=7),
        Fault(role="infer", method="receive", call=8),
        Fault(role="infer", method="generate", call=10, how="stop"),
    )
    faulty(recipe, tmp_path, faults, ahead, "rollout.engine=vllm", "training.eval_interval=0", timeout_s=600)
    assert len(events(tmp_path / "run", "recovered")) == len(faults)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    moved = {row["logps/chosen"] for row in rows}
    assert len(moved) == len(rows)  # the weights change
    differences = [row["rollout/logp_diff_max"] for row in rows if "rollout/logp_diff_max" in row]
    same_version = 1 if lookahead else len(rows)  # steps: with lookahead the first only
    assert len(differences) == same_version
    assert max(differences) < 1e-4
    replay = ("runtime=local", "rollout.engine=replay", f"rollout.replay_path={tmp_path / 'run' / 'rollouts.jsonl'}")
    succeed(recipe.run(tmp_path / "replayed", *COMMON, "training.eval_interval=0", *replay))
    losses = [row["loss"] for row in read_jsonl(tmp_path / "replayed" / "metrics.jsonl")]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_group_that_waits_for_a_lost_rank_is_ended_with_it(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, how: Any
) -> None:
    """The other rank waits in a collective call, whose own limit is ``training.stage_timeout_s``."""
    ranks = ("resource_pool.actor_rollout=3", "actor_rollout.num_gpus_for_train=2", "resource_pool.ref=2")
    faults = (
        Fault(role="train", rank=1, method="update", call=5, how=how),
        Fault(role="ref", rank=1, method="logps", call=9, how=how),
    )
    faulty(recipe, tmp_path, faults, *ranks)
    assert_same(tmp_path / "run", undisturbed(*ranks))
    assert len(events(tmp_path / "run", "rebuilt")) == len(events(tmp_path / "run", "recovered")) == 1


@pytest.mark.timeout(600)
def test_a_worker_that_is_lost_twice_over_the_same_work_ends_the_run_saved(recipe: Recipe, tmp_path: Path) -> None:
    faults = (Fault(role="ref", method="logps", call=5), Fault(role="ref", method="logps", call=6))
    done = faulty(recipe, tmp_path, faults, code=1)
    assert re.search(r"^stage ref, step 5: lost ref rank 0 on node .* during logps", done.stderr, re.MULTILINE)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert re.search(rf"saved: \d+ of 10 steps, {newest}\n", done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trainer_that_is_lost_too_often_ends_the_run_with_75(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    faults = (Fault(role="train", method="update", call=5), Fault(role="train", method="update", call=6))
    done = faulty(recipe, tmp_path, faults, "resilience.max_recoveries=1", code=75)
    assert "resilience.max_recoveries = 1" in done.stderr
    assert f"to go on: python ray_gpt.py --config-dir {recipe.folder}" in done.stderr
    succeed(recipe.run(tmp_path / "run", *COMMON, "runtime=local"))
    assert_same(tmp_path / "run", undisturbed())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_is_waited_for_and_its_roles_go_on_elsewhere(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    with cluster(with_dashboard=False, forks=True) as nodes:
        process, output = _start_on(nodes, recipe, tmp_path / "run", "resilience.node_wait_s=120")
        _wait_for_steps(process, tmp_path / "run", 3)
        nodes.lose_node(1)
        threading.Timer(12.0, nodes.start_node).start()
        text = output()
        assert process.returncode == 0, text
    assert re.search(r"need \d NPU, have 0 after node .* died; waiting up to 120 s", text)
    assert_same(tmp_path / "run", undisturbed("training.train_iters=60"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_that_nobody_replaces_ends_the_run_with_75(recipe: Recipe, tmp_path: Path) -> None:
    with cluster(with_dashboard=False, forks=True) as nodes:
        process, output = _start_on(nodes, recipe, tmp_path / "run", "resilience.node_wait_s=2")
        _wait_for_steps(process, tmp_path / "run", 3)
        nodes.lose_node(1)
        text = output()
    assert process.returncode == 75, text
    assert re.search(r"need \d NPU, have 0 after node .* died, and resilience.node_wait_s = 2 s are over", text)
    assert "to go on: python ray_gpt.py" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_cut_off_is_as_a_lost_one_and_its_workers_end(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """A cable that is pulled: nobody is told, and both ends go on by themselves. Another node takes its place."""
    with ExitStack() as stack:
        try:
            link = stack.enter_context(cable())
        except PermissionError as error:
            pytest.skip(str(error))
        nodes = stack.enter_context(cluster(with_dashboard=False, cable=link, **HEALTH_CHECK))
        process, output = _start_on(nodes, recipe, tmp_path / "run", "resilience.node_wait_s=120")
        _wait_for_steps(process, tmp_path / "run", 3)
        workers = [
            child for child in children(nodes.processes[1].pid) if re.match(r"ray::\w+Worker", command_of(child))
        ]
        assert workers
        link.cut()
        _, alive = psutil.wait_procs(workers, timeout=35)
        assert alive == []
        link.mend()
        nodes.start_node()
        text = output()
        assert process.returncode == 0, text
    assert re.search(r"need \d NPU, have 0 after node .* died; waiting up to 120 s", text)
    assert_same(tmp_path / "run", undisturbed("training.train_iters=60"))


def _start_on(
    nodes: Cluster, recipe: Recipe, run_dir: Path, *overrides: str
) -> tuple[subprocess.Popen[str], Callable[[], str]]:
    """A run on two nodes with two NPUs each: the actor's roles on one, reference and reward on the other."""
    more = ("training.train_iters=60", "resource_pool.resource_name=NPU", *overrides)
    command = nodes.runs(recipe).command(run_dir, *COMMON, *more)
    process = subprocess.Popen(command, env=nodes.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process, lambda: process.communicate(timeout=300)[0]


def _wait_for_steps(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 180
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_the_plan_of_faults_is_read_as_it_is_written(tmp_path: Path) -> None:
    assert Fault(**json.loads(json.dumps(vars(TRAINER[1])))) == TRAINER[1]
