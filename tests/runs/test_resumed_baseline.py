"""What a resumed run holds its evaluations against: the policy that the first start held, wherever its weights are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.local import launch
from rlxf.config.load import load_config
from rlxf.core.errors import CheckpointError
from rlxf.observe.formulas import read_jsonl
from tests.runs.small import Finished, Recipe, World, run

STARTS = ["plain", "megatron", "lora_load", "qlora"]


@pytest.fixture(scope="module")
def starts(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Keys of ``actor_rollout`` by the kind of start; all but the first name weights that the plain folder lacks."""
    folder = tmp_path_factory.mktemp("starts")
    lora = {"lora_r": 4, "lora_alpha": 8}
    before = {"lr": 0.05, "save": str(folder / "ckpt")}
    run(world.recipe(actor_rollout=before), folder / "full")
    run(world.recipe(actor_rollout=before | lora | {"save": str(folder / "adapters")}), folder / "lora")
    return {
        "plain": {},
        "megatron": {"load": str(folder / "ckpt")},
        "lora_load": lora | {"lora_load": str(folder / "lora" / "policy" / "adapter")},
        "qlora": lora | {"qlora": True},
    }


@pytest.fixture(scope="module", params=STARTS)
def start(request: pytest.FixtureRequest, starts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return starts[request.param]


def recipe_of(world: World, save: Path, start: dict[str, Any], **training: Any) -> Recipe:
    recipe = world.recipe(
        training={"train_iters": 4, "save_interval": 2, "eval_interval": 2, **training},
        actor_rollout={"lr": 0.02, "save": str(save), **start},
        eval={"num_prompts": 6},
    )
    recipe["ref"]["load"] = recipe["actor_rollout"]["load"]
    return recipe


@pytest.fixture(scope="module")
def undisturbed(world: World, start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(recipe_of(world, folder / "ckpt", start), folder / "run")


def baseline(save: Path) -> dict[str, Any]:
    """What the initial policy said, in the last checkpoint."""
    found: dict[str, Any] = json.loads((save / "iter_0000004" / "driver.json").read_text())["baseline"]
    return {key: found[key] for key in ("prompts", "scores", "greedy", "texts")}


def go_on(recipe: Recipe, run_dir: Path) -> Finished:
    launch(load_config({"runtime": "local", **recipe}), run_dir)
    return Finished(run_dir)


def evaluations(finished: Finished) -> list[dict[str, Any]]:
    return read_jsonl(finished.folder / "eval.jsonl")


def without_previous(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "previous" not in name}


def test_with_evaluations_from_the_start_a_resumed_run_is_the_undisturbed_one(
    world: World, start: dict[str, Any], undisturbed: Finished, tmp_path: Path
) -> None:
    save = tmp_path / "ckpt"
    run(recipe_of(world, save, start, train_iters=2), tmp_path / "run")
    resumed = go_on(recipe_of(world, save, start), tmp_path / "run")
    assert resumed.numbers == undisturbed.numbers
    assert evaluations(resumed) == evaluations(undisturbed)
    assert baseline(save) == baseline(undisturbed.folder.parent / "ckpt")


def test_evaluations_that_begin_later_are_held_against_the_first_starts_policy(
    world: World, start: dict[str, Any], undisturbed: Finished, tmp_path: Path
) -> None:
    save = tmp_path / "ckpt"
    run(recipe_of(world, save, start, train_iters=2, eval_interval=0), tmp_path / "run")
    resumed = go_on(recipe_of(world, save, start), tmp_path / "run")
    assert baseline(save) == baseline(undisturbed.folder.parent / "ckpt")
    assert without_previous(evaluations(resumed)[-1]) == without_previous(evaluations(undisturbed)[-1])
    assert resumed.losses == undisturbed.losses


@pytest.mark.slow
@pytest.mark.parametrize("before", [{"num_prompts": 3}, {"greedy": False}], ids=["other prompts", "no greedy answers"])
def test_what_is_evaluated_newly_is_asked_of_the_first_starts_policy(
    world: World, start: dict[str, Any], undisturbed: Finished, tmp_path: Path, before: dict[str, Any]
) -> None:
    save = tmp_path / "ckpt"
    first = recipe_of(world, save, start, train_iters=2)
    first["eval"] |= before
    run(first, tmp_path / "run")
    go_on(recipe_of(world, save, start), tmp_path / "run")
    assert baseline(save) == baseline(undisturbed.folder.parent / "ckpt")


def test_an_evaluation_alone_of_a_run_without_any(
    world: World, start: dict[str, Any], undisturbed: Finished, tmp_path: Path
) -> None:
    save = tmp_path / "ckpt"
    run(recipe_of(world, save, start, eval_interval=0), tmp_path / "run")
    alone = copy.deepcopy(recipe_of(world, save, start, eval_only=True))
    (found,) = evaluations(run(alone, tmp_path / "evaluated"))
    expected = evaluations(undisturbed)[-1]
    assert found["eval/win_rate"] == expected["eval/win_rate"]
    assert without_previous(found) == without_previous(expected)


def test_another_policy_is_never_taken_for_the_initial_one(
    world: World, starts: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    save = tmp_path / "ckpt"
    start = starts["lora_load"]
    run(recipe_of(world, save, start, train_iters=2, eval_interval=0), tmp_path / "run")
    fresh = {key: value for key, value in start.items() if key != "lora_load"}
    with pytest.raises(CheckpointError, match=r"actor_rollout\.lora_load .*adapter\" -> null; set it back"):
        go_on(recipe_of(world, save, fresh), tmp_path / "run")
    go_on(recipe_of(world, save, fresh, eval_interval=0), tmp_path / "run")  # nothing is held against it


def test_a_newer_checkpoint_in_the_folder_that_it_started_from_is_another_policy(world: World, tmp_path: Path) -> None:
    run(world.recipe(actor_rollout={"save": str(tmp_path / "first")}), tmp_path / "before")
    save, start = tmp_path / "ckpt", {"load": str(tmp_path / "first")}
    run(recipe_of(world, save, start, train_iters=2, eval_interval=0), tmp_path / "run")
    further = world.recipe(training={"train_iters": 4}, actor_rollout={"save": str(tmp_path / "first")})
    go_on(further, tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"actor_rollout\.load .*iter_0000003\" -> .*iter_0000004\""):
        go_on(recipe_of(world, save, start), tmp_path / "run")
