"""An actor with adapters: its reference, what it gives to engines and folders, and how it goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from rlxf.assembly.build_run import build_probe
from rlxf.assembly.roles import build_actor, build_reference, engine_settings
from rlxf.config.schema import SyncConfig
from rlxf.core.errors import SyncError
from rlxf.core.types import Metrics, ReferencedPairs, Sequences, Tokens
from rlxf.models.hf_folder import HfWeights
from rlxf.platform import Process, get_platform
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.rollout import HfEngine
from rlxf.sync.push import LocalSink, WeightSync
from rlxf.update.actor import MegatronActor
from tests.settings import random_pairs, random_rows, referenced, run_config
from tests.tiny_models import save_causal_lm

PLATFORM = get_platform("cpu")
SETTINGS: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8.0, "lr": 1e-2, "ppo_mini_batch_size": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("actor") / "model", tied=True)


def actor(folder: Path, **settings: Any) -> MegatronActor:
    return build_actor(run_config(folder, **(SETTINGS | settings)), PLATFORM, Process())


def weights(of: MegatronActor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.model.export([name for name, _ in of.model.exported_shapes()])}


def train(of: MegatronActor, steps: range = range(3)) -> list[Metrics]:
    reference = AdapterOffReference(of)
    batches = ((step, random_pairs(6, seed=step % 2)) for step in steps)
    return [of.update(ReferencedPairs(pairs=pairs, reference=reference.logps(pairs)), step) for step, pairs in batches]


@torch.no_grad()
def hf_logps(model: Any, sequences: Sequences) -> Tensor:
    found = []
    for prompt, completion in zip(sequences.prompt_rows(), sequences.completion_rows(), strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"bf16": True}, {"recompute_granularity": "full"}])
def test_the_reference_is_the_base_to_the_bit_before_and_after_training(folder: Path, settings: dict[str, Any]) -> None:
    trained = actor(folder, **settings)
    frozen = build_reference(run_config(folder, **settings), PLATFORM, Process())
    reference, pairs = AdapterOffReference(trained), random_pairs(5, seed=9)
    expected, tokens = frozen.logps(pairs), frozen.token_logps(pairs.chosen)
    for _ in range(2):
        found = reference.logps(pairs)
        assert torch.equal(found.chosen, expected.chosen)
        assert torch.equal(found.rejected, expected.rejected)
        assert torch.equal(reference.token_logps(pairs.chosen), tokens)
        train(trained)
    assert float((trained.token_logps(pairs.chosen) - tokens).abs().max()) > 0.01


def test_training_starts_at_the_reference_and_leaves_it(folder: Path) -> None:
    first, *_, last = train(actor(folder), range(8))
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert first["rewards/margins"] == first["objective/kl"] == 0.0
    assert last["loss"] < 0.9 * math.log(2)
    assert last["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("qlora", [False, True])
def test_only_the_target_linears_of_the_policy_move(folder: Path, qlora: bool) -> None:
    trained = actor(folder, lora_target_modules=("linear_proj",), qlora=qlora)
    before = weights(trained)
    train(trained)
    moved = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    if not qlora:
        files = HfWeights(folder)
        assert all(torch.equal(value, files.read(name)) for name, value in before.items())


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.4}, {"qlora": True}, {"bf16": True, "lora_dropout": 0.4}])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = actor(folder, **settings)
    train(whole, range(2))
    whole.save_checkpoint(tmp_path)
    expected = train(whole, range(2, 4))
    resumed = actor(folder, **settings)
    resumed.load_checkpoint(tmp_path)
    assert train(resumed, range(2, 4)) == expected
    found = weights(resumed)
    assert all(torch.equal(value, found[name]) for name, value in weights(whole).items())


def test_a_checkpoint_holds_no_base(folder: Path, tmp_path: Path) -> None:
    sizes = {}
    for rank in (0, 4):
        (tmp_path / str(rank)).mkdir()
        trained = actor(folder, lora_r=rank)
        trained.update(referenced(random_pairs(6)), 0)
        trained.save_checkpoint(tmp_path / str(rank))
        sizes[rank] = sum(path.stat().st_size for path in (tmp_path / str(rank)).rglob("*"))
    assert sizes[4] < 0.25 * sizes[0]


def test_a_saved_policy_is_merged_and_holds_the_adapter(folder: Path, tmp_path: Path) -> None:
    trained = actor(folder)
    train(trained)
    trained.save_hf(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    rows = random_pairs(4, seed=7).chosen
    expected = trained.token_logps(rows)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(hf_logps(merged, rows), expected, atol=2e-5, rtol=0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert float((hf_logps(base, rows) - expected).abs().max()) > 0.01
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter")
    torch.testing.assert_close(hf_logps(adapted, rows), expected, atol=2e-5, rtol=0)
    assert adapted.peft_config["default"].base_model_name_or_path == str(folder)
    again = actor(folder, lora_load=str(tmp_path / "policy" / "adapter"))
    assert torch.equal(again.token_logps(rows), expected)
    assert torch.equal(again.base_token_logps(rows), actor(folder).token_logps(rows))


# Weight sync


def sync_of(trained: MegatronActor, folder: Path) -> tuple[WeightSync, HfEngine]:
    config = run_config(folder, **SETTINGS)
    engine = HfEngine(engine_settings(config), PLATFORM)
    prompts = Tokens.from_rows(random_rows(4, 5, 20, torch.Generator().manual_seed(3)))
    probe = build_probe(config, PLATFORM, prompts)
    return WeightSync(trained, LocalSink(trained, engine), SyncConfig(verify_first=9), probe), engine


@pytest.mark.parametrize("qlora", [False, True])
def test_engines_sample_from_the_merged_policy(folder: Path, qlora: bool) -> None:
    trained = actor(folder, qlora=qlora)
    sync, _ = sync_of(trained, folder)
    sync.push(0)
    train(trained, range(6))
    difference = sync.push(1).probe_difference
    assert difference is not None
    assert difference < 1e-5


def test_the_probe_sees_an_engine_without_the_adapters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = actor(folder)
    sync, _ = sync_of(trained, folder)
    sync.push(0)
    train(trained, range(6))
    plain = actor(folder, lora_r=0)
    monkeypatch.setattr(trained, "bucket_tensors", plain.bucket_tensors)
    with pytest.raises(SyncError, match="does not hold the actor's weights at version 1"):
        sync.push(1)


# Against PEFT


def test_five_steps_equal_training_with_peft(folder: Path, tmp_path: Path) -> None:
    """Linears whose A is not shared, so that both train the same matrices; from PEFT's own start."""
    torch.manual_seed(3)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"])
    policy = peft.get_peft_model(base, settings)
    policy.save_pretrained(tmp_path / "adapter")
    trained = actor(
        folder, lora_load=str(tmp_path / "adapter"), lora_target_modules=("linear_proj", "linear_fc2"), lr=5e-3
    )
    reference = AdapterOffReference(trained)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for step in range(5):
        pairs = random_pairs(6, seed=step)
        metrics = trained.update(ReferencedPairs(pairs=pairs, reference=reference.logps(pairs)), step)
        with torch.no_grad(), policy.disable_adapter():
            start = peft_sums(policy, pairs.chosen) - peft_sums(policy, pairs.rejected)
        margin = 0.1 * (peft_sums(policy, pairs.chosen) - peft_sums(policy, pairs.rejected) - start)
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=2e-4)
        assert metrics["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-3, abs=1e-5)


def peft_sums(model: Any, sequences: Sequences) -> Tensor:
    sums = []
    for prompt, completion in zip(sequences.prompt_rows(), sequences.completion_rows(), strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)
