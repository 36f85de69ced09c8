"""Adapter folders against PEFT itself: it reads ours, we read its own, and the logits are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.types import Sequences
from rlxf.models.peft_folder import CONFIG, WEIGHTS, read_adapter, save_adapter
from tests.lora_model import adapted_model, adapter_tensors, logps, merged_tensors, randomize_adapters
from tests.settings import random_rows
from tests.tiny_models import save_causal_lm

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def rows() -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return random_rows(4, 2, 12, generator), random_rows(4, 3, 30, generator)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}


@torch.no_grad()
def hf_logps(model: Any, rows: tuple[list[list[int]], list[list[int]]]) -> Tensor:
    found = []
    for prompt, completion in zip(*rows, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def with_peft(folder: Path, adapter: Path, *, is_trainable: bool = False) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable)


def trained_by_peft(folder: Path, out: Path, targets: list[str], **changes: Any) -> Any:
    """A PEFT model whose matrices all differ, saved in ``out``."""
    torch.manual_seed(7)
    settings = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": targets} | changes))
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(out)
    return model


def save(model: Any, out: Path, folder: Path) -> Path:
    save_adapter(out, adapter_tensors(model).items(), rank=4, alpha=8.0, dropout=0.0, base=str(folder))
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_peft_computes_the_same_with_our_folder(tmp_path: Path, kind: str, rows: Any) -> None:
    folder = save_causal_lm(tmp_path / "model", kind)
    model = adapted_model(folder)
    randomize_adapters(model)
    theirs = with_peft(folder, save(model, tmp_path / "adapter", folder))
    ours = logps(model, Sequences.from_rows(*rows))
    torch.testing.assert_close(hf_logps(theirs, rows), ours, atol=2e-5, rtol=0)
    with theirs.disable_adapter():
        assert float((hf_logps(theirs, rows) - ours).abs().max()) > 0.1


def test_peft_merges_our_folder_into_our_merged_weights(tmp_path: Path, folder: Path) -> None:
    model = adapted_model(folder)
    randomize_adapters(model)
    merged = with_peft(folder, save(model, tmp_path / "adapter", folder)).merge_and_unload().state_dict()
    for name, value in merged_tensors(model).items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("targets", [("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), ("linear_fc1",)])
def test_our_own_folder_comes_back_exactly(tmp_path: Path, folder: Path, targets: tuple[str, ...]) -> None:
    model = adapted_model(folder, lora_target_modules=targets)
    randomize_adapters(model)
    adapter = read_adapter(save(model, tmp_path / "adapter", folder), shapes_of(folder))
    assert (adapter.rank, adapter.alpha, adapter.targets) == (4, 8.0, targets)
    assert set(adapter.ranks.values()) == {4}
    expected = adapter_tensors(model)
    assert set(adapter.tensors) == set(expected)
    assert all(torch.equal(adapter.tensors[name], value) for name, value in expected.items())
    again = adapter_tensors(
        adapted_model(folder, lora_load=str(tmp_path / "adapter"), seed=99, lora_target_modules=targets)
    )
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("targets", "ours", "rank"),
    [
        (ALL, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), 12),
        (["q_proj", "v_proj"], ("linear_qkv",), 8),  # PEFT's default for Llama
        (["k_proj"], ("linear_qkv",), 4),
        (["o_proj", "down_proj"], ("linear_proj", "linear_fc2"), 4),
    ],
)
def test_an_adapter_that_peft_trained_computes_the_same_here(
    tmp_path: Path, folder: Path, rows: Any, targets: list[str], ours: tuple[str, ...], rank: int
) -> None:
    theirs = trained_by_peft(folder, tmp_path / "adapter", targets)
    adapter = read_adapter(tmp_path / "adapter", shapes_of(folder))
    assert adapter.targets == ours
    assert max(adapter.ranks.values()) == rank
    model = adapted_model(folder, lora_load=str(tmp_path / "adapter"), lora_target_modules=ours)
    torch.testing.assert_close(logps(model, Sequences.from_rows(*rows)), hf_logps(theirs, rows), atol=2e-5, rtol=0)


def test_an_adapter_of_a_higher_rank_goes_back_to_peft(tmp_path: Path, folder: Path, rows: Any) -> None:
    """Stacked matrices have three times the rank; the folder that holds them says so."""
    theirs = trained_by_peft(folder, tmp_path / "theirs", ALL)
    adapter = read_adapter(tmp_path / "theirs", shapes_of(folder))
    save_adapter(tmp_path / "ours", adapter.tensors.items(), rank=4, alpha=8.0, dropout=0.0, base=str(folder))
    again = with_peft(folder, tmp_path / "ours")
    torch.testing.assert_close(hf_logps(again, rows), hf_logps(theirs, rows), atol=2e-5, rtol=0)
    back = read_adapter(tmp_path / "ours", shapes_of(folder))
    assert all(torch.equal(back.tensors[name], value) for name, value in adapter.tensors.items())


def test_peft_goes_on_training_our_folder(tmp_path: Path, folder: Path) -> None:
    model = adapted_model(folder)
    randomize_adapters(model)
    theirs = with_peft(folder, save(model, tmp_path / "adapter", folder), is_trainable=True)
    theirs(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    trained = [name for name, parameter in theirs.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 2 * len(ALL)


def edited(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora = True: only plain LoRA"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 16}}, r"v_proj is scaled by 4, .* r = 2"),
        ({"r": None}, "not the config of a PEFT adapter"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, folder: Path, changes: dict[str, Any], says: str) -> None:
    trained_by_peft(folder, tmp_path / "adapter", ["q_proj", "v_proj"])
    edited(tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=says):
        read_adapter(tmp_path / "adapter", shapes_of(folder))


def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, folder: Path) -> None:
    adapter = tmp_path / "adapter"
    trained_by_peft(folder, adapter, ["v_proj"])
    trained = load_file(adapter / WEIGHTS)
    prefix = "base_model.model.lm_head"
    head = {f"{prefix}.lora_A.weight": torch.zeros(4, 128), f"{prefix}.lora_B.weight": torch.zeros(259, 4)}
    save_file(trained | head, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=r"lm_head cannot be loaded; expected matrices A and B of the model's q_proj"):
        read_adapter(adapter, shapes_of(folder))
    save_file(trained | {"base_model.model.model.norm.weight": torch.ones(128)}, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=r"holds base_model\.model\.model\.norm\.weight, which is no matrix A or B"):
        read_adapter(adapter, shapes_of(folder))
    trained_by_peft(folder, adapter, ["v_proj"])
    shapes = shapes_of(folder) | {"model.layers.0.self_attn.v_proj.weight": (96, 128)}
    with pytest.raises(
        ModelError, match=r"v_proj is an adapter of a \(64, 128\) matrix, but the model's is \(96, 128\)"
    ):
        read_adapter(adapter, shapes)
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ModelError, match="expected matrices A and B"):
        read_adapter(adapter, shapes_of(folder))


def test_a_recipe_with_other_target_modules_is_refused(tmp_path: Path, folder: Path) -> None:
    trained_by_peft(folder, tmp_path / "adapter", ["q_proj", "down_proj"])
    with pytest.raises(ConfigError, match=r"lora_target_modules = .* names has \['linear_qkv', 'linear_fc2'\]; set it"):
        adapted_model(folder, lora_load=str(tmp_path / "adapter"))


def test_layers_without_an_adapter_start_fresh(tmp_path: Path, folder: Path, rows: Any) -> None:
    theirs = trained_by_peft(folder, tmp_path / "adapter", ALL, layers_to_transform=[1])
    model = adapted_model(folder, lora_load=str(tmp_path / "adapter"))
    torch.testing.assert_close(logps(model, Sequences.from_rows(*rows)), hf_logps(theirs, rows), atol=2e-5, rtol=0)


def test_damaged_folders_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere.adapter_config\.json"):
        read_adapter(tmp_path / "nowhere", {})
    adapter = tmp_path / "adapter"
    trained_by_peft(folder, adapter, ["v_proj"])
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not a readable safetensors file"):
        read_adapter(adapter, shapes_of(folder))
