"""Layers one by one, uneven stages; and what a run does with a model folder that is a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rlxf.assembly.roles import engine_settings
from rlxf.config.folders import folder_problems
from rlxf.core.errors import ModelError, SyncError
from rlxf.models.hf_folder import HfWeights, load_hf_config
from rlxf.models.megatron.weights import to_local
from rlxf.platform import get_platform
from rlxf.reference.cached import cache_folder
from rlxf.rollout.engine import Sampling
from rlxf.rollout.hf import HfEngine
from rlxf.tools.convert.layout import Shape
from tests.rollout_world import prompt_batch
from tests.settings import run_config
from tests.tiny_models import save_causal_lm
from tests.unit.tools.convert.helpers import assert_same_tensors, back, run
from tests.unit.tools.convert.reference_layout import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("hf") / "model", "llama", num_hidden_layers=4)


def whole_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """megatron's parameters of the model that is not cut, a name for each layer."""
    shape, hf = Shape.of(load_hf_config(folder), reward=False, folder=str(folder)), HfWeights(folder)
    return {
        entry.parameter: to_local(
            entry.kind, [hf.read(name) for name in entry.hf_names], shape.geometry(), tp_rank=0, tp_size=1
        )
        for entry in shape.table
    }


@pytest.mark.parametrize("fused_norms", [False, True])
def test_a_distributed_checkpoint_may_hold_every_layer_by_itself(
    folder: Path, tmp_path: Path, fused_norms: bool
) -> None:
    state = whole_parameters(folder)
    if fused_norms:
        state = {
            name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): value
            for name, value in state.items()
        }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "mg"), no_dist=True)
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "hf", "--hf-cfg-dir", str(folder)), folder)


def test_pipeline_stages_may_hold_unequal_numbers_of_layers(folder: Path, tmp_path: Path) -> None:
    root = write_checkpoint(folder, tmp_path / "mg", tp=1, pp=2, rows=259)
    paths = [root / "iter_0000120" / f"mp_rank_00_00{stage}" / "model_optim_rng.pt" for stage in (0, 1)]
    first, second = (torch.load(path, weights_only=False) for path in paths)
    kept: dict[str, Any] = {}
    for name, value in second["model"].items():
        if name.startswith("decoder.layers.0."):
            first["model"][name.replace("layers.0.", "layers.2.")] = value
        else:
            kept[name.replace("layers.1.", "layers.0.")] = value
    second["model"] = kept
    torch.save(first, paths[0])
    torch.save(second, paths[1])
    assert_same_tensors(back(root, tmp_path / "hf", "--hf-cfg-dir", str(folder)), folder)


def test_a_rollout_engine_does_not_sample_before_the_first_weights_have_come(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "mg")
    prompts = prompt_batch([[5, 6, 7]])
    for load in (folder, tmp_path / "mg"):
        config = run_config(load, num_layers=4)
        engine = HfEngine(engine_settings(config), get_platform("cpu"))
        sampling = Sampling(num_samples=1, max_new_tokens=2)
        if load == folder:
            engine.generate(prompts, sampling)
        else:
            with pytest.raises(SyncError):
                engine.generate(prompts, sampling)


def test_references_of_two_checkpoints_have_two_caches(folder: Path, tmp_path: Path) -> None:
    other = save_causal_lm(tmp_path / "other", "llama", num_hidden_layers=4, seed=7)
    for name, source in (("a", folder), ("b", other), ("c", folder)):
        run(source, tmp_path / name)
    first, second, third = (cache_folder(tmp_path, tmp_path / name, "fp32", "cpu") for name in "abc")
    assert first != second
    assert first == third


def test_a_recipe_that_names_a_checkpoint_is_checked_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "dist")
    run(folder, tmp_path / "legacy", "--save-format", "legacy")
    shutil.copytree(tmp_path / "dist", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone" / "iter_0000001")

    def problems(load: Path) -> list[str]:
        config = run_config(load, reward=folder, num_layers=4)
        return [problem.text for problem in folder_problems(config) if "actor_rollout.load" in problem.keys]

    assert not problems(tmp_path / "dist")
    assert "in Megatron's older layout (mp_rank_*); convert it" in problems(tmp_path / "legacy")[0]
    assert "names iter_0000001, which is no distributed checkpoint" in problems(tmp_path / "gone")[0]


def test_the_older_layout_as_a_model_folder_is_refused_with_the_command(folder: Path, tmp_path: Path) -> None:
    from rlxf.models.megatron.dist_folder import open_weights

    run(folder, tmp_path / "legacy", "--save-format", "legacy")
    with pytest.raises(ModelError, match=r"older layout .*: python scripts/convert_ckpt.py --load-model-type mg"):
        open_weights(tmp_path / "legacy", load_hf_config(folder))


def test_the_tokenizer_that_was_asked_for_lies_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    content = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (other / "tokenizer_config.json").write_text(json.dumps(content))
    run(folder, tmp_path / "mg", "--tokenizer-model", str(other / "tokenizer_config.json"))
    assert json.loads((tmp_path / "mg" / "tokenizer_config.json").read_text())["model_max_length"] == 77
