"""What goes through a conversion comes back with every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from rlxf.assembly.roles import load_role
from rlxf.core.errors import ConfigError
from rlxf.core.read_position import stored_position
from rlxf.models.backend import token_logps
from rlxf.models.batching import MicroBatchLimits
from rlxf.models.hf_folder import HfWeights, load_hf_config
from rlxf.models.megatron.weights import Geometry, to_local
from rlxf.platform import Process, get_platform
from tests.settings import random_pairs, run_config
from tests.tiny_models import save_causal_lm, save_reward_model
from tests.unit.tools.convert.helpers import assert_same_tensors, back, hidden_leftovers, run, settings_of

CUT = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
VPP = (*CUT, "--num-layers-per-virtual-pipeline-stage", "1")
LEGACY = ("--save-format", "legacy")
MODELS = [(kind, tied) for kind in ("llama", "qwen2", "qwen3") for tied in (True, False)]
FOUR = ("--target-tensor-parallel-size", "4")  # more ranks than key/value heads, of which these models have two
LAYOUTS = [
    pytest.param(CUT, id="dist"),
    pytest.param((*CUT, *LEGACY), id="legacy"),
    pytest.param((*VPP, *LEGACY), id="legacy-vpp"),
    pytest.param(LEGACY, id="legacy-one-rank"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Four layers, and a vocabulary that two ranks do not share evenly.
    kind, tied = request.param
    return save_causal_lm(tmp_path_factory.mktemp(kind) / "model", kind, tied=tied, num_hidden_layers=4)


@pytest.mark.parametrize("flags", LAYOUTS)
def test_hugging_face_to_megatron_and_back_is_exact(folder: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    run(folder, tmp_path / "mg", *flags)
    result = back(tmp_path / "mg", tmp_path / "hf")
    assert_same_tensors(result, folder)
    assert settings_of(result) == settings_of(folder)
    assert (result / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not hidden_leftovers(tmp_path)


@pytest.mark.parametrize("flags", [FOUR, (*FOUR, *LEGACY)], ids=["dist", "legacy"])
def test_ranks_may_share_a_key_value_head_as_in_a_run(folder: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    run(folder, tmp_path / "mg", *flags)
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "hf"), folder)


def test_a_rank_that_shares_a_key_value_head_has_the_share_of_a_run(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", "qwen2", tied=True)
    run(folder, tmp_path / "mg", *FOUR, *LEGACY)
    hf, geometry = HfWeights(folder), Geometry.of(load_hf_config(folder), tp_size=4)
    for rank in range(4):
        file = tmp_path / "mg" / "iter_0000001" / f"mp_rank_0{rank}" / "model_optim_rng.pt"
        found = torch.load(file, weights_only=False)["model"]["decoder.layers.1.self_attention.linear_qkv.weight"]
        whole = [hf.read(f"model.layers.1.self_attn.{x}_proj.weight") for x in "qkv"]
        assert torch.equal(found, to_local("qkv", whole, geometry, tp_rank=rank, tp_size=4))


def test_ranks_and_key_value_heads_that_do_not_divide_each_other_are_refused(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 384}
    folder = save_causal_lm(tmp_path / "model", "llama", **sizes)
    with pytest.raises(ConfigError, match="size 4: must be a divisor or a multiple of the model's 3 key/value heads"):
        run(folder, tmp_path / "mg", *FOUR)


def test_ranks_of_the_older_layout_hold_what_the_reference_writes(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", "qwen3", tied=True, num_hidden_layers=4)
    run(folder, tmp_path / "mg", *VPP, *LEGACY)
    ranks = sorted(path.name for path in (tmp_path / "mg" / "iter_0000001").iterdir())
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    states = {
        rank: torch.load(tmp_path / "mg" / "iter_0000001" / rank / "model_optim_rng.pt", weights_only=False)
        for rank in ranks
    }
    hf = HfWeights(folder)
    # Virtual stages pass the layers in turn: rank 0 has layers 0 and 2, rank 1 layers 1 and 3, each called layer 0.
    for stage, chunk, layer in ((0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)):
        norm = states[f"mp_rank_00_00{stage}"][f"model{chunk}"]["decoder.layers.0.self_attention.q_layernorm.weight"]
        assert torch.equal(norm, hf.read(f"model.layers.{layer}.self_attn.q_norm.weight"))
    first, last = (states[f"mp_rank_01_00{stage}"] for stage in (0, 1))
    embedding = hf.read("model.embed_tokens.weight")
    assert torch.equal(first["model0"]["embedding.word_embeddings.weight"][:-1], embedding[130:])
    # The last of several pipeline stages has the tied embedding, too.
    assert torch.equal(last["model1"]["output_layer.weight"][:-1], embedding[130:])
    gate, up = (hf.read(f"model.layers.3.mlp.{name}_proj.weight") for name in ("gate", "up"))
    assert torch.equal(last["model1"]["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate[96:], up[96:]]))
    assert last["args"].padded_vocab_size == 260
    assert (last["args"].tensor_model_parallel_size, last["checkpoint_version"], last["iteration"]) == (2, 3.0, 1)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("flags", LAYOUTS)
def test_a_reward_model_comes_back(tmp_path: Path, kind: str, flags: tuple[str, ...]) -> None:
    folder = save_reward_model(tmp_path / "rm", kind, num_hidden_layers=4, rlxf_read_at="end_of_turn")
    run(folder, tmp_path / "mg", "--orm", *flags)
    result = back(tmp_path / "mg", tmp_path / "hf", "--orm")
    assert stored_position(result) == stored_position(tmp_path / "mg") == "end_of_turn"
    assert_same_tensors(result, folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result)
    assert model.config.num_labels == 1
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_weights_get_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str) -> None:
    folder = save_causal_lm(tmp_path / "model", "llama")
    run(folder, tmp_path / "mg", "--params-dtype", dtype)
    result = back(tmp_path / "mg", tmp_path / "hf")
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name in HfWeights(folder).names():
        assert torch.equal(HfWeights(result).read(name), HfWeights(folder).read(name).to(wanted))
    assert json.loads((result / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize(("kind", "tied"), MODELS)
def test_the_actor_starts_from_a_distributed_checkpoint(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = save_causal_lm(tmp_path / "model", kind, tied=tied)
    run(folder, tmp_path / "mg", *CUT)
    rows = random_pairs(5, seed=9).chosen
    models = [
        load_role(run_config(start), "actor_rollout", get_platform("cpu"), Process())
        for start in (folder, tmp_path / "mg")
    ]
    weights = [dict(model.last.named_parameters()) for model in models]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    first, second = (token_logps(model, rows, MicroBatchLimits(num_sequences=2)) for model in models)
    assert torch.equal(first, second)
    assert dict(models[0].exported_shapes()) == dict(models[1].exported_shapes())


def test_megatron_itself_loads_the_checkpoint(tmp_path: Path) -> None:
    """Its loader asks for every tensor and every extra state that its own writer would have written."""
    from megatron.core import dist_checkpointing

    folder = save_causal_lm(tmp_path / "model", "qwen2", tied=False)
    run(folder, tmp_path / "mg")
    model = load_role(run_config(folder), "actor_rollout", get_platform("cpu"), Process())
    expected = {name: value.clone() for name, value in model.last.named_parameters()}
    for parameter in model.last.parameters():
        parameter.data.zero_()
    state = {"model": model.last.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(tmp_path / "mg" / "iter_0000001"))
    model.last.load_state_dict(loaded["model"])
    assert all(torch.equal(value, expected[name]) for name, value in model.last.named_parameters())
