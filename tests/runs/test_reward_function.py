"""Scoring by a Python file, in a whole run: what it gets, what it may leave out, and how its failure ends the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlxf.core.errors import ScoreError
from tests.runs.small import World, command, environment, run

BY_COLUMN = """
def reward(prompts, completions, completion_ids, number, topic):
    assert len(prompts) == len(completions) == len(completion_ids) == len(number) == len(topic)
    for prompt, count, word in zip(prompts, number, topic):
        assert prompt == f"say {word} {count}"
    return [n + len(ids) / 100 for n, ids in zip(number, completion_ids)]
"""

SPARSE = """
def reward(prompts, completions, completion_ids, number, **columns):
    scores = []
    for position, (ids, n) in enumerate(zip(completion_ids, number)):
        nothing = n % 3 == 0 or (n % 3 == 1 and position % 3 == 0)  # no score at all; none for the first sample
        scores.append(None if nothing else float(sum(ids)))
    return scores
"""

RAISES = """
def reward(prompts, completions, completion_ids, **columns):
    table = {}
    return [table[text] for text in completions]
"""

RECORDED = {"tensorboard": False, "samples_interval": 0, "rollouts": True}


def scores_of(rollouts: list[dict[str, Any]]) -> list[list[float | None]]:
    return [[completion["score"] for completion in row["completions"]] for row in rollouts]


def test_a_function_scores_with_the_columns_of_the_data(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        reward=world.reward_function(tmp_path, BY_COLUMN), log=RECORDED, actor_rollout={"no_shuffle": True}
    )
    done = run(recipe, tmp_path / "run")
    for number, row in enumerate(done.rollouts):  # 3 steps of 4 prompts: the file's 12, in its order
        expected = [number + len(completion["token_ids"]) / 100 for completion in row["completions"]]
        assert scores_of([row])[0] == pytest.approx(expected)
    assert done.rows[2]["objective/scores"] == pytest.approx(9.5, abs=0.2)


def test_completions_without_a_score_are_dropped_and_counted(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        reward=world.reward_function(tmp_path, SPARSE),
        log=RECORDED,
        actor_rollout={"no_shuffle": True},
        training={"global_batch_size": 12, "train_iters": 1},
    )
    done = run(recipe, tmp_path / "run")
    found = scores_of(done.rollouts)
    assert [row.count(None) for row in found] == [3, 1, 0] * 4
    (step,) = done.rows
    assert step["pair/kept"] == 8
    assert step["pair/dropped"] == step["pair/missing"] == 4
    assert step["score/missing"] == 16
    assert step["pair/tie_rate"] == 0
    known = [score for row in found for score in row if score is not None]
    assert step["objective/scores"] == pytest.approx(sum(known) / len(known))  # a missing score is no zero
    assert step["reward/score/min"] == min(known)


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=[pytest.mark.cluster, pytest.mark.slow])])
def test_a_function_that_raises_ends_the_run_with_one_line(world: World, tmp_path: Path, runtime: str) -> None:
    reward = world.reward_function(tmp_path, RAISES)
    recipe = world.recipe(reward=reward, rollout={"engine": "hf"})
    line = RAISES.splitlines().index("    return [table[text] for text in completions]") + 1
    process = subprocess.Popen(
        command(recipe, tmp_path / "run", f"runtime={runtime}"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family.update(_children(process.pid))
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    assert process.stderr is not None
    errors = [text for text in process.stderr.read().splitlines() if not text.startswith("INFO")]
    assert process.returncode == 1, errors  # the recipe is not what is wrong
    assert len(errors) == 1, errors
    (error,) = errors
    place = f"step 1: reward.function={reward['function']}: `reward` failed: {reward['function']}:{line}: KeyError"
    assert error.startswith(place)
    assert _alive(family) == []
    assert not (tmp_path / "run" / "summary.json").exists()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _alive(family: set[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(list(family), timeout=10)
    names = [" ".join(child.cmdline())[:100] for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    for child in alive:
        child.kill()
    return names


def test_the_file_is_loaded_once_and_keeps_its_state(world: World, tmp_path: Path) -> None:
    code = """
calls = 0

def reward(prompts, completions, completion_ids, **columns):
    global calls
    calls += 1
    return [calls + i / 100 for i in range(len(completions))]
"""
    done = run(world.recipe(reward=world.reward_function(tmp_path, code)), tmp_path / "run")
    assert [int(row["reward/score/min"]) for row in done.rows] == [1, 2, 3]
    assert sys.modules["rlxf_reward_reward"].calls == 3


# Fails whenever a file of that name is there, in the calls that it names.
FLAKY = """
from pathlib import Path

calls = 0

def reward(prompts, completions, completion_ids, **columns):
    global calls
    calls += 1
    if str(calls) in Path(__file__).with_name("failing").read_text().split():
        raise ConnectionError("503")
    return [float(sum(ids)) for ids in completion_ids]
"""


def test_failed_calls_are_counted_over_a_run_its_evaluations_and_what_goes_on_with_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls: greedy, the baseline and sampled answers before the first step; then each step's, and the evaluation's."""
    reward = world.reward_function(tmp_path, FLAKY) | {"max_failures": 16}
    recipe = world.recipe(
        reward=reward,
        training={"train_iters": 2, "eval_interval": 2},
        eval={"num_prompts": 4, "data_path": str(world.folder / "prompts.jsonl")},
        actor_rollout={"save": str(tmp_path / "ckpt")},
    )
    (tmp_path / "failing").write_text("4 6")  # the first step's 12 completions, and 4 greedy ones after the second
    done = run(recipe, tmp_path / "run")
    assert [row["score/missing"] for row in done.rows] == [12, 0]
    assert "loss" not in done.rows[0]
    assert done.rows[1]["eval/greedy_reward"] is None
    assert done.rows[1]["eval/reward"] is not None
    assert [record.getMessage()[:45] for record in caplog.records if "503" in record.getMessage()] == [
        f"step 1: reward.function={tmp_path}"[:45],
        f"the evaluation after 2 steps: reward.function={tmp_path}"[:45],
    ]
    driver = json.loads((tmp_path / "ckpt" / "iter_0000002" / "driver.json").read_text())
    assert driver["failed_scores"] == 16

    recipe["training"] |= {"train_iters": 4, "eval_interval": 0}
    (tmp_path / "failing").write_text("2")  # the calls of the process that goes on: the fourth step
    recipe["actor_rollout"]["save"] = str(shutil.copytree(tmp_path / "ckpt", tmp_path / "other"))
    with pytest.raises(ScoreError, match=r"^step 4: .*: ConnectionError: 503; 12 completions .* 28 in this run"):
        run(recipe, tmp_path / "again")
    recipe["actor_rollout"]["save"] = str(tmp_path / "ckpt")
    recipe["reward"]["max_failures"] = 28
    done = run(recipe, tmp_path / "allowed")
    assert [row["score/missing"] for row in done.rows] == [0, 12]
    assert "the recipe has changed" not in caplog.text
