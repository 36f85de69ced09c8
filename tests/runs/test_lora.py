"""Whole runs that train adapters: their reference, and how they go on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs.killed import Call, assert_same_run, run_in_child
from tests.runs.small import Finished, Recipe, World, run

LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "lr": 1e-2}


def recipe_of(world: World, **actor: Any) -> Recipe:
    return world.recipe(
        training={"eval_interval": 2}, actor_rollout=LORA | actor, eval={"num_prompts": 4}, sync={"verify_first": 9}
    )


def test_a_reference_of_its_own_gives_the_same_run(world: World, tmp_path: Path) -> None:
    """To the bit: the base under the adapters is the reference."""
    base = run(recipe_of(world), tmp_path / "base")
    recipe = recipe_of(world)
    shutil.copytree(world.folder / "policy", tmp_path / "copy")
    recipe["ref"] = {"model": "small", "load": str(tmp_path / "copy")}
    own = run(recipe, tmp_path / "own")
    assert base.numbers == own.numbers
    assert base.rows[0]["rewards/margins"] == 0.0 != base.rows[-1]["rewards/margins"]
    assert (base.folder / "eval.jsonl").read_text() == (own.folder / "eval.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_dropout(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(world, lora_dropout=0.3)
    recipe["training"] |= {"train_iters": 4, "save_interval": 2}
    recipe["log"] |= {"rollouts": True, "samples_interval": 2}
    assert run_in_child(recipe, tmp_path / "whole").code == 0
    update = Call("rlxf.update.actor:MegatronActor.update", 4)
    assert run_in_child(recipe, tmp_path / "killed", update).code == -signal.SIGKILL
    assert run_in_child(recipe, tmp_path / "killed").code == 0
    assert_same_run(tmp_path / "killed", Finished(tmp_path / "whole"))


@pytest.mark.parametrize("settings", [{"qlora": True}, {"lora_target_modules": ["linear_qkv"], "bf16": True}])
def test_other_kinds_of_adapters_run(world: World, tmp_path: Path, settings: dict[str, Any]) -> None:
    done = run(recipe_of(world, **settings), tmp_path / "run")
    assert len({row["loss"] for row in done.rows}) == 3
    assert (done.folder / "policy" / "adapter" / "adapter_model.safetensors").is_file()
