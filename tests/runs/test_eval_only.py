"""``training.eval_only``: the numbers of the training run's own evaluations, and nothing trained or changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import CheckpointError, ConfigError
from rlxf.observe.formulas import read_jsonl
from tests.runs.small import Finished, Recipe, World, run


def recipe(world: World, folder: Path, **training: Any) -> Recipe:
    return world.recipe(
        training={"train_iters": 4, "save_interval": 2, "eval_interval": 2, **training},
        actor_rollout={"save": str(folder / "ckpt")},
        eval={"num_prompts": 6},
        log={"tensorboard": True, "samples_interval": 1, "rollouts": True},
    )


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("eval_only")
    return run(recipe(world, folder), folder / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def evaluation(folder: Path) -> dict[str, Any]:
    (row,) = read_jsonl(folder / "eval.jsonl")
    return row


def without(row: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if part not in name}


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_is_evaluated_as_the_training_run_did(
    world: World, trained: Finished, tmp_path: Path, step: int
) -> None:
    root = trained.folder.parent
    before = files(root)
    wanted = recipe(world, root, eval_only=True, eval_interval=0, resume=str(root / "ckpt" / f"iter_{step:07d}"))
    done = run(wanted, tmp_path / "evaluated")
    (then,) = (row for row in read_jsonl(trained.folder / "eval.jsonl") if row["step"] == step)
    now = evaluation(done.folder)
    assert now == without(then, "previous")  # which would be the policy itself
    assert "eval/win_rate" in now
    assert files(root) == before
    assert {path.name for path in done.folder.iterdir()} == {"eval.jsonl", "summary.json", "config.yaml", "tensorboard"}
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["steps"] == step
    assert summary["policy"] == str(root / "ckpt" / f"iter_{step:07d}")
    assert summary["end"]["eval/reward"] == now["eval/reward"]
    assert summary["start"]["eval/reward"] == read_jsonl(trained.folder / "eval.jsonl")[0]["eval/reward"]


def test_without_a_checkpoint_the_initial_policy_is_evaluated(
    world: World, trained: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(recipe(world, tmp_path, eval_only=True), tmp_path / "evaluated")
    assert evaluation(done.folder) == without(read_jsonl(trained.folder / "eval.jsonl")[0], "win_rate")
    assert not (tmp_path / "ckpt").exists()
    told = capsys.readouterr().out
    assert "online DPO: evaluated after 0 steps" in told
    assert "win rate" not in told
    assert [line.replace("┃", " ").split() for line in told.splitlines() if "measure" in line] == [["measure", "value"]]


def test_in_the_runs_own_folder_its_files_stay(world: World, tmp_path: Path) -> None:
    from rlxf.assembly.local import launch
    from rlxf.config.load import load_config

    done = run(recipe(world, tmp_path), tmp_path / "run")
    before = files(tmp_path)
    only = recipe(world, tmp_path, eval_only=True)
    only["log"]["report"] = True
    launch(load_config({"runtime": "local", **only}), done.folder)
    assert not (done.folder / "report.html").exists()
    after = files(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"run/eval.jsonl", "run/summary.json"}
    assert after["run/eval.jsonl"].startswith(before["run/eval.jsonl"])
    assert [row["step"] for row in read_jsonl(done.folder / "eval.jsonl")] == [0, 2, 4, 4]
    launch(load_config({"runtime": "local", **recipe(world, tmp_path)}), done.folder)  # still a complete run


def test_a_damaged_checkpoint_is_not_evaluated(world: World, trained: Finished, tmp_path: Path) -> None:
    damaged = tmp_path / "other" / "iter_0000002"
    shutil.copytree(trained.folder.parent / "ckpt" / "iter_0000002", damaged)
    driver = damaged / "driver.json"
    driver.write_bytes(driver.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"driver\.json"):
        run(recipe(world, tmp_path, eval_only=True, resume=str(damaged)), tmp_path / "evaluated")
    assert list((tmp_path / "evaluated").iterdir()) == []


@pytest.mark.parametrize("stage", ["dpo", "replay"])
def test_with_nothing_to_evaluate_it_says_what_is_missing(world: World, tmp_path: Path, stage: str) -> None:
    wanted = recipe(world, tmp_path, eval_only=True)
    expected = "no rollout engine samples with rollout.engine = replay"
    if stage == "dpo":
        wanted["training"]["stage"] = stage
        expected = "set eval.data_path"
    else:
        wanted["rollout"] = {"engine": "replay", "replay_path": "rollouts.jsonl"}
    with pytest.raises(ConfigError, match=rf"training\.eval_only = true: there is nothing to evaluate: {expected}"):
        run(wanted, tmp_path / "evaluated")
