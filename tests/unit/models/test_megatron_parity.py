"""The megatron model computes what Hugging Face computes, and gives back the weights that it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlxf.assembly.roles import load_role
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.types import Sequences
from rlxf.models.backend import sequence_scores, token_logps
from rlxf.models.batching import MicroBatchLimits
from rlxf.platform import Process, get_platform
from tests.settings import random_rows, run_config
from tests.tiny_models import save_causal_lm, save_reward_model

FAMILIES = [(kind, tied) for kind in ("llama", "qwen2", "qwen3") for tied in (True, False)]


def load(config: RunConfig, role: Any = "actor_rollout") -> Any:
    return load_role(config, role, get_platform("cpu", cpu_linear="mkl"), Process())


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, tied = request.param
    return save_causal_lm(tmp_path_factory.mktemp(kind) / "model", kind, tied=tied)


@torch.no_grad()
def test_logits_equal_hugging_face_bit_for_bit(folder: Path) -> None:
    from rlxf.models.megatron.packing import pack_for_scores

    model = load(run_config(folder))
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for row in random_rows(3, 5, 300, torch.Generator().manual_seed(0)):
        packed = pack_for_scores(Sequences.from_rows([row[:1]], [row[1:]]), model.layout)
        logits = torch.nn.functional.linear(model.last(packed)[:, 0], model.head)
        assert torch.equal(logits, hf(torch.tensor([row])).logits[0])


@torch.no_grad()
def test_packed_log_probs_equal_one_sequence_at_a_time_in_hugging_face(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts, completions = random_rows(9, 1, 20, generator), random_rows(9, 1, 60, generator)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = hf(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    values = token_logps(
        load(run_config(folder)), Sequences.from_rows(prompts, completions), MicroBatchLimits(num_sequences=4)
    )
    # Rows of a packed matrix product may be summed in another order: 1 unit in the last place of a logit near 10.
    torch.testing.assert_close(values, torch.cat(expected), atol=5e-6, rtol=0)


def test_export_gives_back_every_tensor_exactly(folder: Path) -> None:
    model = load(run_config(folder))
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    shapes = dict(model.exported_shapes())
    exported = dict(model.export(list(shapes)))
    missing = set(expected) - set(exported)
    assert missing == ({"lm_head.weight"} if model.tied else set())
    for name, tensor in exported.items():
        assert tuple(tensor.shape) == shapes[name]
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_reward_scores_equal_hugging_face(tmp_path: Path, kind: str) -> None:
    folder = save_reward_model(tmp_path / "rm", kind)
    policy = save_causal_lm(tmp_path / "policy", kind)
    rows = random_rows(7, 2, 40, torch.Generator().manual_seed(2))
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    expected = torch.cat([hf(torch.tensor([row])).logits[:, 0] for row in rows])
    sequences = Sequences.from_rows([row[:1] for row in rows], [row[1:] for row in rows])
    model = load(run_config(policy, reward=folder), "reward")
    values = sequence_scores(model, sequences, MicroBatchLimits(num_sequences=3))
    torch.testing.assert_close(values, expected, atol=5e-6, rtol=0)


def test_bf16_logits_stay_near_fp32(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "m")
    sequences = Sequences.from_rows([[5, 6, 7]], [random_rows(1, 50, 51, torch.Generator().manual_seed(3))[0]])
    full = token_logps(load(run_config(folder)), sequences, MicroBatchLimits(num_sequences=1))
    half = token_logps(load(run_config(folder, bf16=True)), sequences, MicroBatchLimits(num_sequences=1))
    assert 0 < float((full - half).abs().max()) < 0.1


def bad_folders(tmp_path: Path) -> dict[str, tuple[Path, str, str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    no_weights = tmp_path / "no_weights"
    save_causal_lm(no_weights)
    (no_weights / "model.safetensors").unlink()
    torn = tmp_path / "torn"
    save_causal_lm(torn)
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    gelu = save_causal_lm(tmp_path / "gelu", hidden_act="gelu")
    return {
        "missing": (tmp_path / "nowhere", "actor_rollout", "no such folder"),
        "empty": (empty, "actor_rollout", "no config.json"),
        "no weights": (no_weights, "actor_rollout", "no model.safetensors"),
        "torn file": (torn, "actor_rollout", "not a readable safetensors file"),
        "another activation": (gelu, "actor_rollout", "hidden_act=gelu"),
        "reward head as policy": (save_reward_model(tmp_path / "rm"), "actor_rollout", "holds a reward model"),
        "policy as reward": (save_causal_lm(tmp_path / "lm"), "reward", "no score.weight"),
        "two labels": (save_reward_model(tmp_path / "rm2", labels=2), "reward", "2 labels; expected 1"),
    }


def test_wrong_model_folders_are_named_with_the_reason(tmp_path: Path) -> None:
    for case, (folder, role, reason) in bad_folders(tmp_path).items():
        with pytest.raises(ModelError, match=reason) as caught:
            load(run_config(folder), role)
        assert str(folder) in str(caught.value), case


def test_a_folder_that_differs_from_the_model_section_is_refused(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "m", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"model\.tiny\.num_layers = 2, .* has 3"):
        load(run_config(folder))
