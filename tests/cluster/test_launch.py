"""Whole runs through ``ray_gpt.py``: the same numbers as in one process, and no process left, however a run ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import RAY, Cluster, Recipe, children, command_of, environment
from tests.runs.small import CLOCKED

pytestmark = pytest.mark.cluster


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKED)}
        for row in read_jsonl(run_dir / "metrics.jsonl")
    ]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


ONLINE = ("training.eval_interval=2", "eval.num_prompts=4", "log.rollouts=true")


@pytest.fixture(scope="module")
def local(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The online run in one process."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    succeed(recipe.run(run_dir, "runtime=local", *ONLINE))
    return run_dir


def test_four_roles_on_ray_give_the_numbers_of_one_process(alone: Recipe, local: Path, tmp_path: Path) -> None:
    text = succeed(alone.run(tmp_path / "ray", *ONLINE))
    assert "starting one on this machine with 4 logical CPU" in text
    rows = numbers(tmp_path / "ray")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len({row["loss"] for row in rows}) > 1
    assert rows == numbers(local)
    roles = ("train", "infer", "ref", "reward", "driver", "node")
    for row in read_jsonl(tmp_path / "ray" / "metrics.jsonl"):
        used = {name: value for name, value in row.items() if name.startswith("memory/")}
        assert set(used) == {f"memory/{role}_rss_gib" for role in roles}
        assert used["memory/node_rss_gib"] == pytest.approx(sum(used.values()) / 2)  # one worker each
    for name in ("rollouts.jsonl", "eval.jsonl", "samples.jsonl"):
        assert (tmp_path / "ray" / name).read_text() == (local / name).read_text()

    from transformers import AutoModelForCausalLM

    policies = [AutoModelForCausalLM.from_pretrained(run / "policy") for run in (tmp_path / "ray", local)]
    for mine, other in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert mine.equal(other)
    assert (tmp_path / "ray" / "checkpoints" / "iter_0000003" / "driver.json").is_file()
    assert json.loads((tmp_path / "ray" / "summary.json").read_text())["steps"] == 3


def test_with_lora_the_actors_processes_are_the_reference(recipe: Recipe, tmp_path: Path) -> None:
    lora = ("actor_rollout.lora_r=4", "actor_rollout.lora_dropout=0.2", "actor_rollout.lr=0.01", "sync.verify_first=3")
    common = (*lora, "training.eval_interval=2", "eval.num_prompts=4")
    text = succeed(recipe.run(tmp_path / "ray", *common))
    assert re.search(r"train rank 0, infer rank 0, reward rank 0$", text, re.M)
    succeed(recipe.run(tmp_path / "local", "runtime=local", *common))
    rows = numbers(tmp_path / "ray")
    assert rows == numbers(tmp_path / "local")
    assert rows[0]["objective/kl"] == 0.0 != rows[-1]["objective/kl"]
    assert (tmp_path / "ray" / "policy" / "adapter" / "adapter_model.safetensors").is_file()


REWARD = """
import os

def reward(prompts, completions, completion_ids, number, **columns):
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"  # as exported
    return [len(set(ids)) + n / 10 for ids, n in zip(completion_ids, number)]
"""


@pytest.mark.slow
def test_a_reward_function_and_a_replay_need_no_device(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    scorer = ("reward.load=null", f"reward.function={tmp_path / 'reward.py'}")
    exported = recipe.env | {"TOKENIZERS_PARALLELISM": "true", "VLLM_CPU_KVCACHE_SPACE": "40"}
    text = succeed(recipe.run(tmp_path / "live", "log.rollouts=true", *scorer, env=exported))
    assert "the workers use these exported variables: TOKENIZERS_PARALLELISM=true (instead of false)" in text
    assert "WARNING: the workers do not use these exported variables: VLLM_CPU_KVCACHE_SPACE=40 (needed: " in text
    assert "reward rank" not in text  # the function has a process of its own, beside the driver
    recorded = ("rollout.engine=replay", f"rollout.replay_path={tmp_path / 'live' / 'rollouts.jsonl'}")
    text = succeed(recipe.run(tmp_path / "replay", *recorded))  # the recipe has a reward model, the file has scores
    assert "infer" not in text
    assert "reward rank" not in text
    losses = [[row["loss"] for row in numbers(tmp_path / run)] for run in ("live", "replay")]
    assert losses[0] == losses[1]


JUDGE = """
def judge(prompts, first, second, **columns):
    return [0.5 + (sum(map(ord, a)) % 7 - sum(map(ord, b)) % 7) / 20 for a, b in zip(first, second)]
"""


@pytest.mark.parametrize("judge", ["", "function", "load"])
def test_sources_and_judges_on_ray_give_the_numbers_of_one_process(judge: str, recipe: Recipe, tmp_path: Path) -> None:
    """Two reward models on the reward workers, a rule and a function beside the driver; or a judge in their place."""
    (tmp_path / "reward.py").write_text(REWARD.replace('assert os.environ["TOKENIZERS_PARALLELISM"] == "true"', ""))
    (tmp_path / "judge.py").write_text(JUDGE)
    model = recipe.folder / "reward"
    sources = (
        f"[{{load: {model}, scale: running}}, {{load: {model}, weight: 0.5, scale: rank}}, "
        f"{{function: {tmp_path / 'reward.py'}, missing: leave_out}}, {{rule: length, options: {{max: 9}}}}]"
    )
    choice = {
        "": (f"reward.sources={sources}",),
        "function": ("reward.load=null", "reward.model=null", f"judge.function={tmp_path / 'judge.py'}"),
        "load": ("reward.load=null", "reward.model=null", f"judge.load={model}"),
    }[judge]
    common = (*choice, "training.eval_interval=2", "eval.num_prompts=4", "actor_rollout.n_samples_per_prompt=3")
    text = succeed(recipe.run(tmp_path / "ray", *common))
    assert ("reward rank 0" in text) == (judge != "function")
    succeed(recipe.run(tmp_path / "local", "runtime=local", *common))
    rows = numbers(tmp_path / "ray")
    assert rows == numbers(tmp_path / "local")
    assert ("judge/asked" in rows[0]) == bool(judge)
    assert not judge or "eval/reward" not in rows[-1]
    assert judge or {"rewards/reward/mean", "rewards/reward_2/mean", "rewards/length/mean"} <= rows[0].keys()


def test_two_engines_draw_the_samples_of_one(recipe: Recipe, local: Path, tmp_path: Path) -> None:
    pools = ("resource_pool.actor_rollout=[3]", "actor_rollout.num_gpus_for_infer=2")
    text = succeed(recipe.run(tmp_path / "two", *ONLINE, *pools))
    assert "infer rank 1" in text
    for mine, other in zip(
        read_jsonl(tmp_path / "two" / "rollouts.jsonl"), read_jsonl(local / "rollouts.jsonl"), strict=True
    ):
        assert [c["token_ids"] for c in mine["completions"]] == [c["token_ids"] for c in other["completions"]]


def test_the_user_guides_cluster_of_two_nodes_trains_with_roles_on_both(
    recipe: Recipe, two_nodes: Cluster, tmp_path: Path
) -> None:
    npus = ("resource_pool.resource_name=NPU", "training.train_iters=2")
    text = succeed(two_nodes.runs(recipe).run(tmp_path, *npus))
    places = [line.removeprefix("INFO: node ") for line in text.splitlines() if line.startswith("INFO: node ")]
    assert sorted(place.split(": ")[1] for place in places) == [
        "ref rank 0, reward rank 0",
        "train rank 0, infer rank 0",
    ]
    assert len({place.split(": ")[0] for place in places}) == 2
    assert len(numbers(tmp_path)) == 2
    assert text.count("has no token: anybody who can reach it") == 1  # no token, and it listens on every interface
    assert "scripts/cluster_up.sh" in text


def test_a_pool_that_the_cluster_cannot_hold_ends_with_a_table(
    recipe: Recipe, two_nodes: Cluster, tmp_path: Path
) -> None:
    pools = ("resource_pool.resource_name=NPU", "resource_pool.ref=[3]")
    done = two_nodes.runs(recipe).run(tmp_path, *pools)
    assert done.returncode == 3
    assert "asked 6 NPU" in done.stderr
    assert "Traceback" not in done.stderr


def started(recipe: Recipe, run_dir: Path) -> subprocess.Popen[str]:
    """An offline run without end, once it has made two steps."""
    fixed = ("training.train_iters=100000", "resilience.max_recoveries=0")
    command = recipe.command(run_dir, *fixed, *recipe.offline)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_until(lambda: _num_lines(run_dir / "metrics.jsonl") >= 2 or process.poll() is not None, 180)
    assert process.poll() is None, process.communicate()[0]
    return process


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def leftovers(processes: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=10)
    names = [command_of(process)[:100] for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    return names


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_leaves_no_process(alone: Recipe, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = started(alone, tmp_path)
    family = children(process.pid)
    assert any("raylet" in command_of(child) for child in family)
    workers = [child for child in family if "Worker" in command_of(child)]
    assert {worker.nice() for worker in workers} == {psutil.Process(process.pid).nice()}  # Ray would give them the rest
    begin = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal does: to everything that the command started
    else:
        process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 30
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert leftovers(family) == []
    steps = read_jsonl(tmp_path / "metrics.jsonl")
    latest = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert latest == steps[-1]["step"]
    driver = json.loads((tmp_path / "checkpoints" / f"iter_{latest:07d}" / "driver.json").read_text())
    assert (driver["step"], driver["policy_version"]) == (latest, latest)


@pytest.mark.slow
def test_sigterm_to_every_process_ends_the_run_and_it_says_whether_it_saved(alone: Recipe, tmp_path: Path) -> None:
    """It ends Ray's processes, too, beside the save: a run that asked them afterwards who is gone never ended."""
    process = started(alone, tmp_path)
    family = children(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output
    assert leftovers(family) == []
    saved = list_checkpoints(tmp_path / "checkpoints")
    assert ("\nsaved: " in output, "\nnot saved: " in output) == (bool(saved), not saved), output


@pytest.mark.slow
def test_a_signal_while_models_load_leaves_no_process(alone: Recipe, tmp_path: Path) -> None:
    process = subprocess.Popen(
        alone.command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: any("ActorWorker" in command_of(child) for child in children(process.pid)), 120)
    family = children(process.pid)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output
    assert leftovers(family) == []


@pytest.mark.slow  # without Ray: tests/unit/core/test_stop.py
def test_a_second_signal_leaves_at_once_without_saving(alone: Recipe, tmp_path: Path) -> None:
    process = started(alone, tmp_path)
    family = children(process.pid)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode in (130, 143)
    assert leftovers(family) == []
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.slow  # of another role, without --slow: test_ends.py
def test_a_lost_worker_ends_the_run_and_is_named(alone: Recipe, tmp_path: Path) -> None:
    process = started(alone, tmp_path)
    family = children(process.pid)
    (reference,) = [child for child in family if "ReferenceWorker" in command_of(child)]
    begin = time.monotonic()
    reference.kill()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 30
    assert process.returncode == 1
    assert "lost ref rank 0 on node" in output
    assert "stage ref, step " in output
    assert "Traceback" not in output
    assert leftovers(family) == []


@pytest.mark.slow  # Ray's own way to start what the other tests start
def test_a_run_is_a_ray_job(alone: Recipe, two_nodes: Cluster, tmp_path: Path) -> None:
    env = {name: value for name, value in two_nodes.env.items() if name != "RAY_ADDRESS"}  # Ray sets it inside the job
    deadline = time.monotonic() + 90

    def job(*arguments: str) -> str:
        command = [str(RAY), "job", arguments[0], f"--address={two_nodes.dashboard}", *arguments[1:]]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        # Ray's job agents start after the nodes are up; on a busy machine that takes a while.
        while "No available agent" in done.stderr and time.monotonic() < deadline:
            time.sleep(2)
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ended() -> bool:
        status = job("status", "small")
        assert "failed" not in status, job("logs", "small")
        return "succeeded" in status

    command = alone.command(tmp_path / "run", "resource_pool.resource_name=NPU", "training.train_iters=1")
    job("submit", "--no-wait", "--submission-id=small", "--", *command)
    wait_until(ended, 200)
    assert len(numbers(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_moving_reference_on_ray_gives_the_numbers_of_one_process(recipe: Recipe, tmp_path: Path) -> None:
    """In bf16, where small moves need an fp32 copy of the weights; and after a resume."""
    moving = (*recipe.offline, "training.bf16=true", "ref.ref_update_interval=1", "ref.ref_mixup_alpha=0.01")
    for runtime in ("ray", "local"):
        common = (f"runtime={runtime}", "actor_rollout.lr=0.01", *moving)
        succeed(recipe.run(tmp_path / runtime, *common))
        succeed(recipe.run(tmp_path / runtime, *common, "training.train_iters=5"))
    rows = numbers(tmp_path / "ray")
    assert rows == numbers(tmp_path / "local")
    assert len(rows) == 5
    last = "checkpoints/iter_0000005/reference/model.safetensors"
    assert (tmp_path / "ray" / last).read_bytes() == (tmp_path / "local" / last).read_bytes()
    still = (*recipe.offline, "training.bf16=true", "actor_rollout.lr=0.01")
    succeed(recipe.run(tmp_path / "still", "runtime=local", *still))
    assert rows[1]["rewards/chosen"] != numbers(tmp_path / "still")[1]["rewards/chosen"]  # it did move
