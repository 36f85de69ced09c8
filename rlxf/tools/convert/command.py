"""The command line of ``scripts/convert_ckpt.py``: the flags of MindSpeed-LLM's converter, and what they mean here."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from rlxf.core.errors import ConfigError

Kind = Literal["hf", "mg"]

# Flags of other converters that have no effect here, and why.
_NOTHING_TO_DO = {
    "use_mcore_models": "checkpoints are always megatron-core's",
    "add_qkv_bias": "config.json decides whether there is one",
    "moe_grouped_gemm": "there are no experts",
    "model_type": "there is one type, GPT",
    "loader": "follows from --load-model-type",
    "saver": "follows from --save-model-type",
    "spec": "follows from config.json",
    "transformer_impl": "the files are the same",
    "lora_target_modules": "the adapter's files say it",
    "lora_r": "the adapter's files say it",
    "load_checkpoint_loosely": "every tensor is looked for; with --orm the language model's head is not",
}
# Flags that would change the result in a way that is not supported.
_UNSUPPORTED = {
    "target_expert_parallel_size": ("1", "models with experts (MoE) are not supported"),
    "expert_tensor_parallel_size": ("1", "models with experts (MoE) are not supported"),
    "num_layer_list": (None, "every pipeline rank gets as many layers"),
    "noop_layers": (None, "layers that do nothing are not supported"),
    "add_dense_bias": (None, "models with a bias there are not supported"),
    "embed_layernorm": (None, "models with a norm there are not supported"),
    "post_norm": (None, "models with norms there are not supported"),
    "w_pack": (None, "models that pack their weights so are not supported"),
    "qlora_nf4": (None, "the base is put into 4 bits when it is loaded: actor_rollout.qlora=true"),
}
_SWITCHES = {
    *("use_mcore_models", "add_qkv_bias", "moe_grouped_gemm", "load_checkpoint_loosely"),
    *("add_dense_bias", "embed_layernorm", "post_norm", "qlora_nf4"),
}
_LISTS = {"lora_target_modules", "spec"}
_DTYPES = {"fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16"}
_DTYPES |= {"bf16": "bfloat16", "bfloat16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to convert, and into what."""

    load_kind: Kind
    save_kind: Kind
    load_dir: Path
    save_dir: Path
    hf_cfg_dir: Path | None = None  # with config.json; None: looked for
    tokenizer: Path | None = None  # folder with the tokenizer; None: that of config.json
    tp: int = 1
    pp: int = 1
    layers_per_chunk: int | None = None
    legacy: bool = False  # write Megatron's older layout
    reward: bool = False
    dtype: str | None = None  # of torch; None: as it is
    model_type: str | None = None
    lora_load: Path | None = None
    lora_alpha: float | None = None
    adapters_only: bool = False
    trust_pickle: bool = False
    overwrite: bool = False
    notes: tuple[str, ...] = ()  # about flags that have no effect


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see scripts/convert_ckpt.py --help")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        description="Convert model weights: Hugging Face <-> megatron (distributed checkpoint, or mp_rank_* files).",
        epilog="docs/convert.md has examples.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--load-model-type", choices=("hf", "mg"), required=True, help="what --load-dir holds")
    add("--save-model-type", choices=("hf", "mg"), required=True, help="what --save-dir will hold")
    add("--load-dir", type=Path, required=True, help="HF folder, folder of a run's checkpoints, one iter_*, mp_rank_*")
    add("--save-dir", type=Path, required=True, help="new folder; written under another name and renamed last")
    add("--overwrite", action="store_true", help="replace --save-dir if it is there")
    add("--hf-cfg-dir", type=Path, help="HF folder with config.json and tokenizer, where --load-dir has none")
    add("--tokenizer-model", type=Path, help="tokenizer to put beside the weights: its folder, or a file in it")
    add("--target-tensor-parallel-size", type=int, default=1, metavar="TP")
    add("--target-pipeline-parallel-size", type=int, default=1, metavar="PP")
    add("--num-layers-per-virtual-pipeline-stage", type=int, metavar="N", help="layers of each piece of a rank")
    add("--save-format", choices=("dist", "legacy"), default="dist", help="mg: distributed checkpoint, or mp_rank_*")
    add("--orm", action="store_true", help="a reward model: *ForSequenceClassification with one label")
    add("--params-dtype", choices=tuple(_DTYPES), help="of the written weights; default: as they are")
    add("--model-type-hf", metavar="NAME", help="checked against config.json; not needed")
    add("--lora-load", type=Path, metavar="DIR", help="PEFT folder, or checkpoint with adapters, to merge")
    add("--lora-alpha", type=float, help="of adapters in mp_rank_* files, if those do not say it")
    add(
        "--save-lora-to-hf", action="store_true", help="write the checkpoint's adapters as a PEFT folder, not the model"
    )
    add("--trust-pickle", action="store_true", help="let mp_rank_* files use globals besides tensors: can run code")
    for name in (*_NOTHING_TO_DO, *_UNSUPPORTED):
        option = f"--{name.replace('_', '-')}"
        if name in _SWITCHES:
            add(option, action="store_true", help=argparse.SUPPRESS)
        else:
            add(option, nargs="*" if name in _LISTS else None, help=argparse.SUPPRESS)
    return made


def read_command(arguments: list[str]) -> Request:
    """The request that a command line makes.

    Raises:
        ConfigError: a flag is unknown, missing or wrong, or asks for what is not supported.
    """
    found = parser().parse_args(arguments)
    given = {name: value for name, value in vars(found).items() if value not in (None, False)}
    problems = [
        f"--{name.replace('_', '-')}: {why}"
        for name, (plain, why) in _UNSUPPORTED.items()
        if name in given and given[name] != plain
    ]
    legacy = found.save_format == "legacy"
    if found.save_model_type == "hf" and legacy:
        problems.append("--save-format legacy: is for --save-model-type mg")
    if found.save_lora_to_hf and (found.load_model_type, found.save_model_type) != ("mg", "hf"):
        problems.append("--save-lora-to-hf: needs --load-model-type mg --save-model-type hf")
    if found.save_lora_to_hf and found.lora_load is not None:
        problems.append("--save-lora-to-hf: writes the checkpoint's own adapters; leave out --lora-load")
    if problems:
        raise ConfigError(*problems)
    notes = [
        f"--{name.replace('_', '-')}: nothing to do, {why}" for name, why in _NOTHING_TO_DO.items() if name in given
    ]
    if found.save_model_type == "hf" and (found.target_tensor_parallel_size, found.target_pipeline_parallel_size) != (
        1,
        1,
    ):
        notes.append("--target-*-parallel-size: nothing to do, a Hugging Face folder is not cut")
    tokenizer = found.tokenizer_model
    return Request(
        load_kind=found.load_model_type,
        save_kind=found.save_model_type,
        load_dir=found.load_dir,
        save_dir=found.save_dir,
        hf_cfg_dir=found.hf_cfg_dir,
        tokenizer=tokenizer.parent if tokenizer is not None and tokenizer.is_file() else tokenizer,
        tp=found.target_tensor_parallel_size,
        pp=found.target_pipeline_parallel_size,
        layers_per_chunk=found.num_layers_per_virtual_pipeline_stage,
        legacy=legacy,
        reward=found.orm,
        dtype=None if found.params_dtype is None else _DTYPES[found.params_dtype],
        model_type=found.model_type_hf,
        lora_load=found.lora_load,
        lora_alpha=found.lora_alpha,
        adapters_only=found.save_lora_to_hf,
        trust_pickle=found.trust_pickle,
        overwrite=found.overwrite,
        notes=tuple(notes),
    )
