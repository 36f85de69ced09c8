"""PEFT adapter folders: what ``peft.PeftModel.from_pretrained`` reads and ``PeftModel.save_pretrained`` writes.

In PEFT, query, key and value have their own A and B each. Here the three share one A, and so do gate and up. Export
repeats the shared A. Import stacks their As: with A = [Aq; Ak; Av], B of the query = [Bq, 0, 0] and so on, each product
B A is exactly what it was, at three times the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.core.files import new_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "score.weight"  # of a reward model, which trains beside the adapter and is saved with it
_PREFIX = "base_model.model."

# Linears here -> the Hugging Face linears that share their input, and so A.
FUSED: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_TARGET_OF = {name: target for target, names in FUSED.items() for name in names}

# Settings that can change an adapter's arithmetic or its base, and their values that change nothing.
_OFF: tuple[Any, ...] = (None, False, [], {})
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # pissa and others change the base
    **dict.fromkeys(
        (
            *("fan_in_fan_out", "use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias"),
            *("alora_invocation_tokens", "trainable_token_indices", "target_parameters", "layer_replication"),
            *("velora_config", "monteclora_config", "kasa_config", "arrow_config"),
        ),
        _OFF,
    ),
    "modules_to_save": (*_OFF, ["score"], ["classifier", "score"]),  # the second is what PEFT makes of SEQ_CLS
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """An adapter with A fused: ``model.layers.0.self_attn.q_proj.lora_A.weight`` is that of k_proj and v_proj, too."""

    rank: int  # r of the config; the scale is alpha / r
    alpha: float
    # A [rank, in] under the first of each FUSED group, B [out, rank] under each name; a reward model's HEAD [1, H]
    tensors: Mapping[str, Tensor]

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that have an adapter, by the names of ``lora_target_modules``."""
        found = {_split(name)[2] for name in self.tensors}
        return tuple(target for target, names in FUSED.items() if found.intersection(names))

    @property
    def ranks(self) -> dict[str, int]:
        """Name of each linear (the first of a group) -> the rank of its adapter."""
        kind = ".lora_A.weight"
        return {name.removesuffix(kind): a.shape[0] for name, a in self.tensors.items() if name.endswith(kind)}


def save_adapter(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, rank: int, alpha: float, dropout: float, base: str
) -> None:
    """Write a PEFT folder; complete or not there at all.

    Args:
        folder: an older one of that name is replaced.
        tensors: full matrices, named as in ``PeftAdapter.tensors``.
        rank: r of the recipe. alpha: its lora_alpha. dropout: its lora_dropout.
        base: the model folder that the adapter belongs to.
    """
    from safetensors.torch import save_file

    written: dict[str, Tensor] = {}
    patterns: dict[str, int] = {}  # linears whose rank is not r
    for name, tensor in tensors:
        block, matrix, linear = _split(name)
        own = tensor.detach().cpu().contiguous()
        if matrix == "lora_A":
            for other in FUSED[_TARGET_OF[linear]]:
                written[f"{_PREFIX}{block}{other}.lora_A.weight"] = own.clone()  # safetensors writes no shared memory
                if own.shape[0] != rank:
                    patterns[block + other] = own.shape[0]
        else:
            written[_PREFIX + name] = own
    has_head = _PREFIX + HEAD in written
    linears = {_split(name.removeprefix(_PREFIX))[2] for name in written if name != _PREFIX + HEAD}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "modules_to_save": ["score"] if has_head else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(linears),
        "rank_pattern": patterns,
        "alpha_pattern": {name: r * alpha / rank for name, r in patterns.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        save_file(written, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftAdapter:
    """The adapter in a PEFT folder, fused.

    Args:
        folder: written by PEFT or by ``save_adapter``.
        shapes: Hugging Face name and full shape of every tensor of the base.

    Raises:
        ModelError: the folder holds none, a damaged one, one of another base, or one whose arithmetic is not plain LoRA
            on the linears of attention and feed-forward.
    """
    settings = _read_settings(folder)
    refused = [f"{key} = {settings[key]!r}" for key, plain in _PLAIN.items() if settings.get(key) not in plain]
    if refused:
        raise ModelError(f"{folder}: {', '.join(refused)}: only plain LoRA can be loaded; merge it into a model first")
    tensors = _read_tensors(folder)
    fused: dict[str, Tensor] = {}
    if HEAD in tensors:
        fused[HEAD] = _checked_head(folder, tensors.pop(HEAD), shapes)
    groups: dict[tuple[str, str], dict[str, _Pair]] = {}
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        pair = _pair(folder, module, tensors, shapes)
        _check_scale(folder, module, settings)
        block, _, linear = _split(f"{module}.lora_A.weight")
        groups.setdefault((block, _TARGET_OF[linear]), {})[linear] = pair
    for (block, target), pairs in groups.items():
        rows = {name: shapes[f"{block}{name}.weight"][0] for name in FUSED[target]}
        fused |= {block + name: tensor for name, tensor in _fuse(pairs, rows).items()}
    return PeftAdapter(rank=int(settings["r"]), alpha=float(settings["lora_alpha"]), tensors=fused)


def _checked_head(folder: Path, head: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    expected = (1, *shapes["model.norm.weight"])
    if head.shape != expected:
        raise ModelError(f"{folder}: {HEAD} has the shape {tuple(head.shape)}; expected {expected}: one label")
    return head


_Pair = tuple[Tensor, Tensor]  # A [r, in], B [out, r]


def _pair(folder: Path, module: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> _Pair:
    first, second = (tensors.get(f"{module}.lora_{part}.weight") for part in "AB")
    shape = shapes.get(f"{module}.weight")
    if module.rpartition(".")[2] not in _TARGET_OF or shape is None or first is None or second is None:
        known = ", ".join(_TARGET_OF)
        raise ModelError(f"{folder}: {module} cannot be loaded; expected matrices A and B of the model's {known}")
    found = (second.shape[0], first.shape[1])
    if found != shape or first.shape[0] != second.shape[1]:
        raise ModelError(f"{folder}: {module} is an adapter of a {found} matrix, but the model's is {shape}")
    return first, second


def _check_scale(folder: Path, module: str, settings: Mapping[str, Any]) -> None:
    rank, alpha = float(settings["r"]), float(settings["lora_alpha"])
    own_rank = _pattern(settings, "rank_pattern", module, rank)
    own_alpha = _pattern(settings, "alpha_pattern", module, alpha)
    if own_alpha / own_rank != alpha / rank:
        raise ModelError(
            f"{folder}: {module} is scaled by {own_alpha / own_rank:g}, the other linears by lora_alpha / r = "
            f"{alpha / rank:g}; only one scale can be loaded; merge it into a model first"
        )


def _fuse(pairs: Mapping[str, _Pair], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """One A under the first name of ``rows``, and one B under each; those without a pair get a B of zeros."""
    firsts = [first for first, _ in pairs.values()]
    is_shared = all(torch.equal(first, firsts[0]) for first in firsts)
    stacked = firsts[0] if is_shared else torch.cat(firsts)
    names = list(rows)
    fused = {f"{names[0]}.lora_A.weight": stacked}
    for name in names:
        second = stacked.new_zeros(rows[name], stacked.shape[0])
        start = 0
        for owner, (first, own) in pairs.items():
            if owner == name:
                second[:, start : start + first.shape[0]] = own
            start += 0 if is_shared else first.shape[0]
        fused[f"{name}.lora_B.weight"] = second
    return fused


def _split(name: str) -> tuple[str, str, str]:
    """``model.layers.0.mlp.up_proj.lora_A.weight`` -> ``model.layers.0.mlp.``, ``lora_A``, ``up_proj``."""
    module, _, rest = name.rpartition(".lora_")
    block, dot, linear = module.rpartition(".")
    return block + dot, f"lora_{rest.removesuffix('.weight')}", linear


def _pattern(settings: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (settings.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / CONFIG}: not the config of a PEFT adapter ({error!r})") from error
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from error
    other = sorted(
        name for name in tensors if not re.search(rf"\.lora_[AB]\.weight$|^{re.escape(_PREFIX + HEAD)}$", name)
    )
    if other:
        raise ModelError(f"{folder}: holds {other[0]}, which is no matrix A or B; merge it into a model first")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
