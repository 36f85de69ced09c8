"""What a conversion reads: the weights, the ``config.json`` that fits them, and the adapters beside or for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlxf.checkpointing.manifest import DRIVER, MANIFEST, find_problems
from rlxf.checkpointing.store import LATEST
from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.model_folder import assets_folder, megatron_checkpoint
from rlxf.core.read_position import READ_AT, stored_position
from rlxf.models.hf_folder import HfWeights, ModelWeights, load_hf_config
from rlxf.models.megatron.dist_folder import DistCheckpoint, DistWeights
from rlxf.models.peft_folder import CONFIG, HEAD, PeftAdapter, read_adapter
from rlxf.models.tokenizer import padding_id
from rlxf.tools.convert.adapters import MergedWeights, adapters_of_legacy, adapters_of_run
from rlxf.tools.convert.command import Request
from rlxf.tools.convert.layout import Shape
from rlxf.tools.convert.legacy import LegacyWeights

# Names that MindSpeed-LLM gives model types, by how they begin -> model_type of config.json.
_MODEL_TYPES = {"llama": "llama", "qwen15": "qwen2", "qwen1.5": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is about to be written in another form."""

    weights: ModelWeights | None  # None: only the adapter is wanted
    shape: Shape
    assets: Path  # the Hugging Face folder with config.json and tokenizer
    changes: dict[str, Any]  # of its config.json
    adapter: PeftAdapter | None  # of the checkpoint itself
    dropout: float  # that it was trained with
    notes: list[str]


def open_source(request: Request) -> Source:
    """Find and open everything that the request reads.

    Raises:
        ConfigError, ModelError: something is missing, damaged, or belongs to another model.
    """
    checkpoint = None if request.load_kind == "hf" else find_checkpoint(request.load_dir)
    assets = _assets(request, checkpoint)
    hf_config = load_hf_config(assets)
    _check_model_type(request.model_type, hf_config)
    shape = Shape.of(hf_config, reward=request.reward, folder=str(assets))
    opened = _opened_hf(assets) if checkpoint is None else _opened_megatron(request, checkpoint, assets, shape)
    weights, notes = opened.weights, list(opened.notes)
    if request.lora_load is not None and weights is not None:
        weights = MergedWeights(weights, _given_adapter(request, weights, shape), shape)
    if weights is not None:
        _check_head(request, HEAD in weights)
    changes = _reward_settings(hf_config, assets, checkpoint) if request.reward else {}
    return Source(weights, shape, assets, changes, opened.adapter, opened.dropout, notes)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint itself: the folder, or the one that its tracker file names.

    Raises:
        ModelError: there is none.
    """
    if not folder.is_dir():
        raise ModelError(f"--load-dir {folder}: no such folder")
    if (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*")):
        return folder
    tracker = folder / LATEST
    if not tracker.is_file():
        found = sorted(path.name for path in folder.glob("iter_*"))
        hint = (
            f"name one of {', '.join(found[-3:])} in it" if found else "expected iter_*, mp_rank_* or .metadata in it"
        )
        raise ModelError(f"--load-dir {folder}: no checkpoint of megatron and no {LATEST}; {hint}")
    newest = tracker.read_text(errors="replace").strip()
    checkpoint = folder / (f"iter_{int(newest):07d}" if newest.isdecimal() else "release")
    if not checkpoint.is_dir():
        raise ModelError(f"--load-dir {folder}: {LATEST} names {checkpoint.name}, which is not there")
    return checkpoint


def _assets(request: Request, checkpoint: Path | None) -> Path:
    """The folder with config.json."""
    places: list[Path | None] = [request.hf_cfg_dir or request.load_dir]
    if checkpoint is not None and request.hf_cfg_dir is None:
        places += [checkpoint, checkpoint.parent, _start_of_run(checkpoint), request.save_dir]
    for place in places:
        if place is not None and (place / "config.json").is_file():
            return place
    if request.hf_cfg_dir:
        raise ModelError(f"--hf-cfg-dir {request.hf_cfg_dir}: no config.json in it")
    if checkpoint is None:
        kind = "no such folder" if not request.load_dir.is_dir() else "no config.json in it"
        raise ModelError(f"--load-dir {request.load_dir}: {kind}; expected a Hugging Face model folder")
    raise ModelError(f"{checkpoint}: the kind of model is unknown; name its Hugging Face folder in --hf-cfg-dir")


def _run_settings(checkpoint: Path) -> dict[str, Any] | None:
    """The section ``actor_rollout`` of the recipe that wrote a checkpoint; None if no run of this program did."""
    path = checkpoint / DRIVER
    if not path.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text())["config"]["actor_rollout"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read: {error!r}") from error
    return settings


def _start_of_run(checkpoint: Path) -> Path | None:
    settings = _run_settings(checkpoint)
    return None if settings is None or settings.get("load") is None else Path(settings["load"])


def _check_model_type(name: str | None, hf_config: Any) -> None:
    if name is None:
        return
    expected = next((kind for start, kind in _MODEL_TYPES.items() if name.lower().startswith(start)), None)
    if expected is None:
        raise ConfigError(
            f"--model-type-hf {name}: not supported; known: names that begin with {', '.join(_MODEL_TYPES)}"
        )
    if expected != hf_config.model_type:
        raise ConfigError(
            f'--model-type-hf {name}: config.json has model_type = "{hf_config.model_type}"; leave it out'
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    """What ``--load-dir`` holds."""

    weights: ModelWeights | None
    adapter: PeftAdapter | None = None
    dropout: float = 0.0
    notes: tuple[str, ...] = ()


def _opened_hf(folder: Path) -> _Opened:
    return _Opened(_hf_weights(folder, load_hf_config(folder)))


def _hf_weights(folder: Path, hf_config: Any) -> HfWeights:
    weights = HfWeights(folder)
    shape = Shape.of(hf_config, reward=HEAD in weights, folder=str(folder))
    _check_names(folder, weights, shape)
    if shape.reward and weights.shape(HEAD)[0] != 1:
        raise ModelError(f"{folder}: the reward head has {weights.shape(HEAD)[0]} labels; expected 1")
    _check_shapes(folder, weights, shape)
    return weights


def _check_names(folder: Path, weights: ModelWeights, shape: Shape) -> None:
    expected, found = set(shape.hf_names), weights.names()
    if missing := sorted(expected - found):
        raise ModelError(f"{folder}: no {missing[0]} ({len(missing)} tensors are missing); config.json asks for it")
    ignored = {"lm_head.weight"} if shape.tied else set[str]()
    others = sorted(name for name in found - expected - ignored if not name.endswith("rotary_emb.inv_freq"))
    if others:
        raise ModelError(f"{folder}: holds {others[0]}, which a {shape.hf_config.model_type} model does not have")


def _check_shapes(folder: Path, weights: ModelWeights, shape: Shape) -> None:
    config, geometry = shape.hf_config, shape.geometry()
    rows = {"q": geometry.heads * geometry.head_size, "k": geometry.kv_heads * geometry.head_size}
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        f"{layer}self_attn.q_proj.weight": (rows["q"], config.hidden_size),
        f"{layer}self_attn.k_proj.weight": (rows["k"], config.hidden_size),
        f"{layer}mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, size in expected.items():
        if weights.shape(name) != size:
            raise ModelError(f"{folder}: {name} has shape {weights.shape(name)}; config.json expects {size}")


def _opened_megatron(request: Request, checkpoint: Path, assets: Path, shape: Shape) -> _Opened:
    if (checkpoint / MANIFEST).is_file() and (problems := find_problems(checkpoint)):
        raise ModelError(f"{checkpoint}: damaged: {'; '.join(problems[:3])}")
    if any(checkpoint.glob("mp_rank_*")):
        return _opened_legacy(request, checkpoint, shape)
    run = _run_settings(checkpoint)
    if run is None or not run.get("lora_r"):
        if request.adapters_only:
            raise ModelError(f"{checkpoint}: holds no LoRA adapters; leave out --save-lora-to-hf")
        return _Opened(DistWeights(checkpoint, shape.hf_config))
    adapter = adapters_of_run(DistCheckpoint(checkpoint), shape, rank=run["lora_r"], alpha=run["lora_alpha"])
    if request.adapters_only:
        return _Opened(None, adapter, run["lora_dropout"])
    if run.get("qlora"):
        raise ModelError(
            f"{checkpoint}: a run with qlora=true, whose base is rounded to 4 bits; take the run's `policy` folder, or "
            "its adapter (--save-lora-to-hf)"
        )
    below = megatron_checkpoint(assets)
    config = shape.hf_config
    base = _hf_weights(assets, config) if below is None else DistWeights(below, config)
    notes = (f"merged the adapters of {checkpoint.name} into {assets}",)
    return _Opened(MergedWeights(base, adapter, shape), adapter, notes=notes)


def _check_head(request: Request, has_head: bool) -> None:
    if request.reward and not has_head:
        raise ModelError(f"{request.load_dir}: no reward head ({HEAD}) in it; leave out --orm")
    if has_head and not request.reward:
        raise ModelError(f"{request.load_dir}: holds a reward model ({HEAD}); add --orm")


def _opened_legacy(request: Request, checkpoint: Path, shape: Shape) -> _Opened:
    weights = LegacyWeights(checkpoint, shape, trust_pickle=request.trust_pickle)
    notes = []
    bias = weights.bias_of_score() if request.reward else None
    if bias is not None and bool(bias.any()):
        notes.append(
            f"left out rm_head.bias = {bias.tolist()}: it raises every score alike, and there is no place for it"
        )
    if not (request.adapters_only or weights.has_adapters):
        return _Opened(weights, notes=tuple(notes))
    adapter = adapters_of_legacy(weights, shape, alpha=request.lora_alpha)
    if request.adapters_only:
        return _Opened(None, adapter, notes=tuple(notes))
    notes.append(f"merged the adapters of {checkpoint.name}: r = {adapter.rank}, alpha = {adapter.alpha:g}")
    return _Opened(MergedWeights(weights, adapter, shape), adapter, notes=tuple(notes))


def _given_adapter(request: Request, weights: ModelWeights, shape: Shape) -> PeftAdapter:
    """The adapter that ``--lora-load`` names."""
    assert request.lora_load is not None
    folder = request.lora_load
    if (folder / CONFIG).is_file():
        return read_adapter(folder, {name: weights.shape(name) for name in weights.names()})
    if not folder.is_dir():
        raise ModelError(f"--lora-load {folder}: no such folder")
    checkpoint = next(_checkpoints(folder), None)
    if checkpoint is None:
        raise ModelError(f"--lora-load {folder}: neither a PEFT folder ({CONFIG}) nor a checkpoint of megatron")
    run = _run_settings(checkpoint)
    if run is not None:
        return adapters_of_run(DistCheckpoint(checkpoint), shape, rank=run["lora_r"], alpha=run["lora_alpha"])
    found = LegacyWeights(checkpoint, shape, trust_pickle=request.trust_pickle)
    return adapters_of_legacy(found, shape, alpha=request.lora_alpha)


def _checkpoints(folder: Path) -> Iterator[Path]:
    try:
        yield find_checkpoint(folder)
    except ModelError:
        return


def _reward_settings(hf_config: Any, assets: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Entries of a reward model's config.json that ``assets`` lacks: its kind, and where its score is read."""
    position = stored_position(checkpoint or assets)
    return _classifier(hf_config, assets) | ({READ_AT: position} if position else {})


def _classifier(hf_config: Any, assets: Path) -> dict[str, Any]:
    """What makes a language model's config.json that of a reward model; nothing for one that is."""
    kinds = [str(kind) for kind in hf_config.architectures or []]
    if any(kind.endswith("ForSequenceClassification") for kind in kinds) and hf_config.num_labels == 1:
        return {}
    changes: dict[str, Any] = {
        "architectures": [f"{type(hf_config).__name__.removesuffix('Config')}ForSequenceClassification"],
        **{"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    }
    # transformers reads the score of a padded row at the last token that is not this one.
    return changes | {"pad_token_id": hf_config.pad_token_id or padding_id(assets_folder(assets))}
