"""Weights by broadcast between nodes: the numbers of shared memory, also when a receiver dies in a push."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Cluster, Recipe
from tests.cluster.faults import Fault, happened
from tests.cluster.faults import run as faulty
from tests.cluster.test_launch import succeed
from tests.cluster.test_recovery import without_shares
from tests.cluster.test_resume import weights

pytestmark = pytest.mark.cluster

REWARD = """
def reward(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""
# Two tensor-parallel ranks on one node, two engines on the other one.
LAYOUT = (
    *("resource_pool.resource_name=NPU", "resource_pool.actor_rollout=[2,2]", "resource_pool.colocate=[train,ref]"),
    *("actor_rollout.num_gpus_for_train=2", "actor_rollout.num_gpus_for_infer=2", "resource_pool.ref=2"),
    *("actor_rollout.tensor_model_parallel_size=2", "ref.tensor_model_parallel_size=2", "sync.bucket_mb=1"),
    *("training.train_iters=5", "rollout.lookahead=1", "training.save_interval=2", "log.rollouts=true"),
)


def overrides(folder: Path, transport: str) -> tuple[str, ...]:
    (folder / "reward.py").write_text(REWARD)
    reward = ("reward.load=null", f"reward.function={folder / 'reward.py'}")
    return (*LAYOUT, *reward, f"sync.transport={transport}")


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, two_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose weights travel through shared memory: two raylets of one machine can."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(two_nodes.runs(recipe).run(folder / "run", *overrides(folder, "shared_memory")))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broadcast_in_which_a_receiver_dies_is_made_again_and_no_number_changes(
    recipe: Recipe, undisturbed: Path, two_nodes: Cluster, tmp_path: Path
) -> None:
    """An engine that is started again while the trainer is at work gets its copy of what was pushed."""
    faults = (
        Fault(role="infer", rank=1, method="receive", call=6),
        Fault(role="infer", rank=0, method="generate", call=4),
    )
    options = (*overrides(tmp_path, "collective"), "resilience.min_deadline_s=5")
    done = faulty(two_nodes.runs(recipe).command(tmp_path / "run", *options), tmp_path / "plan", faults, two_nodes.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert happened(tmp_path / "plan") == len(faults)
    assert "weights travel through a broadcast between devices (sync.transport says so)" in done.stderr
    assert re.search(r"lost infer rank 1 on node .* during (receive|end_update)", done.stderr)
    assert_same(tmp_path / "run", undisturbed)
    assert all(row["sync/copy_s"] >= 0 for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.slow
def test_a_broadcast_brings_what_shared_memory_brings(
    recipe: Recipe, undisturbed: Path, two_nodes: Cluster, tmp_path: Path
) -> None:
    succeed(two_nodes.runs(recipe).run(tmp_path / "run", *overrides(tmp_path, "collective")))
    assert_same(tmp_path / "run", undisturbed)


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert without_shares(run_dir) == without_shares(undisturbed)
    assert (run_dir / "rollouts.jsonl").read_bytes() == (undisturbed / "rollouts.jsonl").read_bytes()
    found, expected = weights(run_dir), weights(undisturbed)
    assert all(found[name].equal(value) for name, value in expected.items())


def test_a_transport_that_cannot_work_is_an_error_before_a_model_loads(
    recipe: Recipe, two_nodes: Cluster, tmp_path: Path
) -> None:
    options = (*overrides(tmp_path, "ipc"), "actor_rollout.load=" + str(recipe.folder / "policy"))
    done = two_nodes.runs(recipe).run(tmp_path / "run", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sync.transport = ipc: a cpu has no memory of its own that processes could share by handles" in done.stderr
    assert "set sync.transport=auto, which would be shared_memory here" in done.stderr
