"""Conversions around whole runs: what a run leaves becomes a model folder, and a run starts from what was converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import ModelError
from rlxf.core.read_position import stored_position
from tests.data_world import write_rows
from tests.layouts import train, train_on
from tests.runs.small import Finished, Recipe, World, make_world, run
from tests.tiny_models import save_causal_lm
from tests.unit.models.test_layouts import FP32, SETTINGS, TP2, assert_equal_runs
from tests.unit.tools.convert.helpers import assert_same_tensors, back, settings_of
from tests.unit.tools.convert.helpers import run as convert


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def saved(recipe: Recipe, folder: Path) -> Recipe:
    recipe["actor_rollout"]["save"] = str(folder)
    return recipe


def test_a_checkpoint_of_a_run_is_its_policy(world: World, tmp_path: Path) -> None:
    run(saved(world.recipe(), tmp_path / "ckpt"), tmp_path / "run")
    assert_same_tensors(back(tmp_path / "ckpt", tmp_path / "hf"), tmp_path / "run" / "policy")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_checkpoint_of_a_run_with_lora_is_its_policy(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(actor_rollout={"lora_r": 4, "lora_alpha": 16, "lr": 0.05})
    run(saved(recipe, tmp_path / "ckpt"), tmp_path / "run")
    assert_same_tensors(back(tmp_path / "ckpt" / "iter_0000003", tmp_path / "hf"), tmp_path / "run" / "policy")


def trained(finished: Finished) -> list[dict[str, Any]]:
    """Every number but the probe's: an engine that holds no weights before the first push has no cached prefix either,
    so its sums are taken in another order."""
    return [{name: v for name, v in row.items() if name != "sync/probe_difference"} for row in finished.numbers]


def test_a_run_from_converted_folders_is_the_run_from_the_originals(world: World, tmp_path: Path) -> None:
    """Actor, reference, reward model, rollout engine, and the folder that the run leaves."""
    convert(world.folder / "policy", tmp_path / "policy", "--target-tensor-parallel-size", "2")
    convert(world.folder / "reward", tmp_path / "reward", "--orm")
    loads = {"actor_rollout": "policy", "ref": "policy", "reward": "reward"}
    sections = {role: {"load": str(tmp_path / name)} for role, name in loads.items()}
    converted = run(world.recipe(**sections), tmp_path / "converted")
    original = run(world.recipe(), tmp_path / "original")
    assert trained(converted) == trained(original)
    assert_same_tensors(tmp_path / "converted" / "policy", tmp_path / "original" / "policy")


def test_two_ranks_start_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", "llama", tied=True, num_hidden_layers=4)
    convert(folder, tmp_path / "mg")
    found = train_on(tmp_path / "mg", 2, tmp_path / "found.pt", **(SETTINGS | TP2))
    from rlxf.platform import Process

    assert_equal_runs(found, train(folder, None, Process(), SETTINGS), FP32)


def test_a_run_starts_from_a_checkpoint_of_another(world: World, tmp_path: Path) -> None:
    run(saved(world.recipe(), tmp_path / "ckpt"), tmp_path / "first")
    loads = (tmp_path / "ckpt", tmp_path / "ckpt" / "iter_0000003", tmp_path / "first" / "policy")
    found = [
        run(world.recipe(actor_rollout={"load": str(load)}, ref={"load": str(load)}), tmp_path / f"next{i}")
        for i, load in enumerate(loads)
    ]
    assert trained(found[0]) == trained(found[1]) == trained(found[2])
    assert_same_tensors(tmp_path / "next0" / "policy", tmp_path / "next2" / "policy")
    assert (tmp_path / "next0" / "policy" / "tokenizer.json").is_file()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_checkpoint_of_a_reward_models_training_is_the_reward_model(
    world: World, tmp_path: Path, lora_r: int
) -> None:
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    recipe = world.recipe(training={"stage": "rm"}, actor_rollout={"data_path": str(tmp_path / "pairs.jsonl")})
    recipe["actor_rollout"] |= {"lora_r": lora_r, "lr": 0.01}
    run(saved(recipe, tmp_path / "ckpt"), tmp_path / "run")
    back(tmp_path / "ckpt", tmp_path / "hf", "--orm")
    assert_same_tensors(tmp_path / "hf", tmp_path / "run" / "policy")
    assert settings_of(tmp_path / "hf") == settings_of(tmp_path / "run" / "policy")
    assert settings_of(tmp_path / "hf")["rlxf_read_at"] == "end_of_turn"
    assert stored_position(tmp_path / "ckpt") == "end_of_turn"  # so it may be a run's reward.load as it is
    if lora_r:
        back(tmp_path / "ckpt", tmp_path / "adapter", "--save-lora-to-hf", "--orm")
        files = [
            folder / "adapter_model.safetensors"
            for folder in (tmp_path / "adapter", tmp_path / "run" / "policy" / "adapter")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
        base, adapter = world.folder / "policy", str(tmp_path / "adapter")
        convert(base, tmp_path / "merged", "--lora-load", adapter, "--orm", kinds=("hf", "hf"))
        assert_same_tensors(tmp_path / "merged", tmp_path / "hf")
        with pytest.raises(ModelError, match=r"holds a reward model .*; add --orm"):
            convert(base, tmp_path / "wrong", "--lora-load", adapter, kinds=("hf", "hf"))
