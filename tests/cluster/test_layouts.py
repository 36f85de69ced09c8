"""The tiny world on Ray with a policy in two processes: the samples and losses of the shipped recipe on one.

Prompts and samples are keyed, so all runs draw the same until rounding, which another layout changes, moves a sample
over an edge. What is compared: the samples and the losses of the first two steps at least, and of all steps up to the
first sample that differs.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Cluster, Recipe
from tests.runs import tiny
from tests.runs.killed import typed_in_child
from tests.runs.small import Finished

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 4
# Every step moves the weights by the whole learning rate; adam_eps keeps gradients that are rounding from doing so.
COMMON = (
    f"training.train_iters={STEPS}", "training.eval_interval=0", "training.seed=3", "log.tensorboard=false",
    "log.rollouts=true", "actor_rollout.lr_warmup_iters=0", "actor_rollout.lr_decay_style=constant",
    "actor_rollout.adam_eps=1e-3",
)  # fmt: skip
TOLERANCE = 2e-6  # of a loss near 0.69; weights of layouts differ by 2e-5 at most (tests/unit/models/test_layouts.py)


def run(run_dir: Path, recipe: str, *overrides: str, on: Recipe | None = None) -> Finished:
    """A shipped recipe in one process, or on the cluster of ``on``."""
    options = ("--config-name", recipe, f"hydra.run.dir={run_dir}", *COMMON, *overrides)
    if on is None:
        ended = typed_in_child((*options, "runtime=local"), timeout_s=540)
        assert ended.code == 0, ended.output[-4000:]
    else:
        command = [on.python, str(ROOT / "ray_gpt.py"), *options]
        done = subprocess.run(command, env=on.env, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr[-4000:]
    return Finished(run_dir)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The shipped recipe in one process."""
    tiny.build_world()
    done = run(tmp_path_factory.mktemp("one") / "run", "online_dpo_trainer_tiny")
    assert len({round(loss, 3) for loss in done.losses}) > 2  # it learns: losses tell the steps apart
    return done


def samples(done: Finished) -> list[list[list[int]]]:
    """For each step, the token ids of all its completions."""
    steps: dict[int, list[list[int]]] = {step: [] for step in range(1, STEPS + 1)}
    for row in done.rollouts:
        steps[row["step"]] += [completion["token_ids"] for completion in row["completions"]]
    return list(steps.values())


def assert_same(found: Finished, expected: Finished) -> None:
    pairs = zip(samples(found), samples(expected), strict=True)
    same = [mine == theirs for mine, theirs in pairs]
    steps = (*same, False).index(False)
    assert steps >= 2, f"samples differ in step {steps + 1}"
    assert found.losses[:steps] == pytest.approx(expected.losses[:steps], abs=TOLERANCE)


@pytest.mark.slow  # 100 s; the layouts without vLLM are tests/unit/models/test_layouts.py
def test_two_tensor_parallel_ranks_with_vllm(recipe: Recipe, tmp_path: Path) -> None:
    """vLLM's samples are not the HF engine's: one process replays them, all steps, on the model with three heads."""
    found = run(tmp_path / "tp2", "online_dpo_trainer_tiny_tp2", on=recipe)
    replay = ("rollout.engine=replay", f"rollout.replay_path={tmp_path / 'tp2' / 'rollouts.jsonl'}")
    expected = run(tmp_path / "replay", "online_dpo_trainer_tiny", *replay)
    assert len({round(loss, 3) for loss in found.losses}) > 2
    assert found.losses == pytest.approx(expected.losses, abs=TOLERANCE)
    # The engine samples from what the two ranks trained (the probes of the first two updates agreed, too).
    assert max(row["rollout/logp_diff_max"] for row in found.rows) < 1e-4


@pytest.mark.slow  # of one process group: tests/unit/models/test_layouts.py
def test_two_pipeline_stages(one: Finished, recipe: Recipe, tmp_path: Path) -> None:
    assert_same(run(tmp_path / "pp2", "online_dpo_trainer_tiny_pp2", "rollout.engine=hf", on=recipe), one)


@pytest.mark.slow  # two nodes: test_launch.py; data parallel: tests/unit/models/test_layouts.py
def test_two_data_parallel_ranks_on_two_nodes(
    one: Finished, recipe: Recipe, two_nodes: Cluster, tmp_path: Path
) -> None:
    """A rank on each node, the engine on the second; the reference shares the reward model's device."""
    pools = (
        "resource_pool.resource_name=NPU", "resource_pool.actor_rollout=[1,2]", "resource_pool.colocate=[ref,reward]"
    )  # fmt: skip
    shipped = ("online_dpo_trainer_tiny_dp2", "rollout.engine=hf", *pools)
    assert_same(run(tmp_path / "dp2", *shipped, on=two_nodes.runs(recipe)), one)


MORE = {
    "dp2 on one node": ("online_dpo_trainer_tiny_dp2",),
    "cp2": (
        "online_dpo_trainer_tiny_dp2", "actor_rollout.context_parallel_size=2", "actor_rollout.ppo_mini_batch_size=32",
    ),
    "tp2-sp": ("online_dpo_trainer_tiny_tp2", "actor_rollout.sequence_parallel=true"),
    "every role in two": (
        "online_dpo_trainer_tiny_tp2", "actor_rollout.sequence_parallel=true", "resource_pool.ref=2",
        "ref.pipeline_model_parallel_size=2", "resource_pool.reward=2", "reward.tensor_model_parallel_size=2",
        "actor_rollout.num_gpus_for_infer=2", "resource_pool.actor_rollout=4",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_layouts(one: Finished, recipe: Recipe, tmp_path: Path, name: str) -> None:
    assert_same(run(tmp_path / "run", *MORE[name], "rollout.engine=hf", on=recipe), one)
