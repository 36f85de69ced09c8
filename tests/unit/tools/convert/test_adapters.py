"""LoRA: checkpoints of runs, PEFT folders and adapters in the older layout, merged and taken out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import ModelError
from rlxf.platform import Process, get_platform
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm
from tests.unit.tools.convert.helpers import assert_same_tensors, back, run

LORA = {"lora_r": 4, "lora_alpha": 8.0, "ppo_mini_batch_size": 4, "lr": 0.05}


@dataclass(frozen=True)
class Trained:
    """What a short run with LoRA leaves: a checkpoint, and the policy with its adapter."""

    base: Path
    checkpoint: Path
    policy: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    base = save_causal_lm(folder / "base", "qwen2", tied=False)
    config = run_config(base, **LORA)
    actor = build_actor(config, get_platform("cpu"), Process())
    for step in range(2):
        actor.update(referenced(random_pairs(4, seed=step)), step)
    checkpoint = folder / "ckpt" / "iter_0000002"
    checkpoint.mkdir(parents=True)
    actor.save_checkpoint(checkpoint)
    (checkpoint / "driver.json").write_text(json.dumps({"config": config.dump()}))
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("2")
    actor.save_hf(folder / "policy")
    return Trained(base, checkpoint, folder / "policy")


def test_a_checkpoint_of_adapters_merged_is_the_policy_that_the_run_saved(trained: Trained, tmp_path: Path) -> None:
    assert_same_tensors(back(trained.checkpoint.parent, tmp_path / "hf"), trained.policy)


def test_the_adapters_taken_out_are_those_that_the_run_saved(trained: Trained, tmp_path: Path) -> None:
    back(trained.checkpoint, tmp_path / "adapter", "--save-lora-to-hf")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).is_file()
    found, expected = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", trained.policy / "adapter")
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(bool(value.any()) for name, value in found.items() if ".lora_B." in name)
    settings, theirs = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "adapter", trained.policy / "adapter")
    )
    assert settings == theirs


def test_a_peft_folder_merged_is_the_policy_too(trained: Trained, tmp_path: Path) -> None:
    run(trained.base, tmp_path / "hf", "--lora-load", str(trained.policy / "adapter"), kinds=("hf", "hf"))
    assert_same_tensors(tmp_path / "hf", trained.policy)
    run(trained.base, tmp_path / "mg", "--lora-load", str(trained.checkpoint), "--target-tensor-parallel-size", "2")
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "again"), trained.policy)


@torch.no_grad()
def test_merged_logits_are_those_of_peft(trained: Trained, tmp_path: Path) -> None:
    run(trained.base, tmp_path / "hf", "--lora-load", str(trained.policy / "adapter"), kinds=("hf", "hf"))
    base = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
    wrapped = peft.PeftModel.from_pretrained(base, trained.policy / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    row = torch.arange(3, 43)[None]
    torch.testing.assert_close(merged(row).logits, wrapped(row).logits, atol=2e-5, rtol=1e-5)


def _with_adapters(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Rename the linears of rank files as a LoRA run of the reference does, and put its matrices beside them."""
    for path in folder.rglob("model_optim_rng.pt"):
        state: dict[str, Any] = torch.load(path, weights_only=False)
        tp_rank = int(path.parent.name.split("_")[2])
        model = {}
        for name, value in state["model"].items():
            place = name.removesuffix(".weight")
            model[f"{place}.base_layer.weight" if place.endswith("linear_proj") else name] = value
            if place.endswith("linear_proj"):
                layer = int(path.parent.name.split("_")[3]) * 1 + int(name.split(".")[2])
                first = tensors[f"model.layers.{layer}.A"]  # cut along its inputs, like the linear
                model[f"{place}.lora_A.default.weight"] = first.chunk(2, dim=1)[tp_rank].clone()
                model[f"{place}.lora_B.default.weight"] = tensors[f"model.layers.{layer}.B"]
        state["model"] = model
        torch.save(state, path)


def test_adapters_in_the_older_layout_are_merged_and_taken_out(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", "llama")
    sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2", "--save-format", "legacy")
    run(folder, tmp_path / "plain", *sizes)
    shutil.copytree(tmp_path / "plain", tmp_path / "lora")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.{m}": torch.randn(*size, generator=generator)
        for layer in range(2)
        for m, size in (("A", (4, 128)), ("B", (128, 4)))
    }
    _with_adapters(tmp_path / "lora", tensors)
    with pytest.raises(ModelError, match="lora_alpha is not in the files; add --lora-alpha"):
        back(tmp_path / "lora", tmp_path / "merged")
    back(tmp_path / "lora", tmp_path / "merged", "--lora-alpha", "8")
    back(tmp_path / "plain", tmp_path / "same", "--lora-load", str(tmp_path / "lora"), "--lora-alpha", "8")
    assert_same_tensors(tmp_path / "merged", tmp_path / "same")
    merged, base = (load_file(name / "model.safetensors") for name in (tmp_path / "merged", folder))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        expected = base[name] + 2 * tensors[f"model.layers.{layer}.B"] @ tensors[f"model.layers.{layer}.A"]
        torch.testing.assert_close(merged[name], expected)
    back(tmp_path / "lora", tmp_path / "peft", "--save-lora-to-hf", "--lora-alpha", "8")
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(adapter) == 4
    found = adapter["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"]
    assert torch.equal(found, tensors["model.layers.1.A"])


def test_a_checkpoint_of_adapters_alone_is_no_model(trained: Trained, tmp_path: Path) -> None:
    from rlxf.models.hf_folder import load_hf_config
    from rlxf.models.megatron.dist_folder import DistWeights

    with pytest.raises(ModelError, match="holds LoRA adapters only; merge them"):
        DistWeights(trained.checkpoint, load_hf_config(trained.base))
