"""A checkpoint as a training run of the reference leaves it: made here by hand, not with the product's writer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlxf.models.hf_folder import HfWeights

HEADS, GROUPS, SIZE, FFN = 4, 2, 32, 192  # of tests/tiny_models.py


def write_checkpoint(
    hf_folder: Path, root: Path, *, tp: int, pp: int, rows: int, reward_bias: float | None = None, **beside: Any
) -> Path:
    """``root`` with a tracker and ``iter_0000120``; the vocabulary filled up to ``rows`` with a row that is not zero.

    Args:
        hf_folder: a Llama of four layers, untied; a reward model if there is a ``reward_bias``.
        root: new folder.
        tp: tensor parallel ranks. pp: pipeline parallel ranks.
        rows: of the embedding.
        reward_bias: of the reward head.
        beside: more that each file holds.
    """
    hf = HfWeights(hf_folder)
    for stage in range(pp):
        for rank in range(tp):
            model = _rank(hf, rank, tp, stage, pp, rows, reward_bias)
            state = {
                "args": argparse.Namespace(num_layers=4, tensor_model_parallel_size=tp, swiglu=True),
                "checkpoint_version": 3.0,
                "iteration": 120,
                "model": model,
                "optimizer": {"param_groups": [{"lr": 1e-6, "step": 120}]},
                "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
                "num_floating_point_operations_so_far": 0,
                **beside,
            }
            name = f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
            folder = root / "iter_0000120" / name
            folder.mkdir(parents=True)
            torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("120")
    return root


def _rank(
    hf: HfWeights, rank: int, tp: int, stage: int, pp: int, rows: int, reward_bias: float | None
) -> dict[str, Tensor | None]:
    model: dict[str, Tensor | None] = {}
    if stage == 0:
        model["embedding.word_embeddings.weight"] = _vocabulary(hf.read("model.embed_tokens.weight"), rank, tp, rows)
    per_stage = 4 // pp
    for local in range(per_stage):
        hf_name, name = f"model.layers.{stage * per_stage + local}.", f"decoder.layers.{local}."
        model |= _layer(hf, hf_name, name, rank, tp)
    if stage == pp - 1:
        model["decoder.final_layernorm.weight"] = hf.read("model.norm.weight")
        if reward_bias is None:
            model["output_layer.weight"] = _vocabulary(hf.read("lm_head.weight"), rank, tp, rows)
        else:
            width = 128 // tp
            model["rm_head.weight"] = hf.read("score.weight")[:, rank * width : (rank + 1) * width].clone()
            model["rm_head.bias"] = torch.tensor([reward_bias])
    return model


def _vocabulary(whole: Tensor, rank: int, tp: int, rows: int) -> Tensor:
    full = torch.cat([whole, whole[-1:].expand(rows - len(whole), -1)])
    return full[rank * rows // tp : (rank + 1) * rows // tp].clone()


def _layer(hf: HfWeights, hf_name: str, name: str, rank: int, tp: int) -> dict[str, Tensor | None]:
    q, k, v, o = (hf.read(f"{hf_name}self_attn.{x}_proj.weight") for x in "qkvo")
    gate, up, down = (hf.read(f"{hf_name}mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
    per_group = HEADS // GROUPS * SIZE
    groups = [
        torch.cat([q[g * per_group : (g + 1) * per_group], k[g * SIZE : (g + 1) * SIZE], v[g * SIZE : (g + 1) * SIZE]])
        for g in range(rank * GROUPS // tp, (rank + 1) * GROUPS // tp)
    ]
    ffn = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
    heads = slice(rank * HEADS * SIZE // tp, (rank + 1) * HEADS * SIZE // tp)
    return {
        f"{name}input_layernorm.weight": hf.read(f"{hf_name}input_layernorm.weight"),
        f"{name}self_attention.linear_qkv.weight": torch.cat(groups),
        f"{name}self_attention.linear_qkv._extra_state": None,
        f"{name}self_attention.linear_proj.weight": o[:, heads].clone(),
        f"{name}pre_mlp_layernorm.weight": hf.read(f"{hf_name}post_attention_layernorm.weight"),
        f"{name}mlp.linear_fc1.weight": torch.cat([gate[ffn], up[ffn]]),
        f"{name}mlp.linear_fc2.weight": down[:, ffn].clone(),
    }
