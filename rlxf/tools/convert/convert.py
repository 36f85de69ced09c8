"""One conversion: open the source, write the new folder beside its place, rename it last."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlxf.checkpointing.store import LATEST
from rlxf.core.errors import ConfigError
from rlxf.core.files import publish, recover, temporary_for
from rlxf.models.hf_folder import ModelWeights, save_hf_folder, write_assets
from rlxf.models.peft_folder import save_adapter
from rlxf.tools.convert.command import Request
from rlxf.tools.convert.dist import write_dist
from rlxf.tools.convert.layout import Sizes, target_sizes
from rlxf.tools.convert.legacy import write_legacy
from rlxf.tools.convert.source import Source, open_source

_ITERATION = "iter_0000001"


def convert(request: Request, say: Callable[[str], None]) -> Path:
    """Do what the request asks for; the folder that was written.

    Raises:
        ConfigError, ModelError: the request or what it reads is wrong; nothing was written.
    """
    for note in request.notes:
        say(note)
    if not request.load_dir.is_dir():
        raise ConfigError(f"--load-dir {request.load_dir}: no such folder")
    if request.tokenizer is not None and not _tokenizer_files(request.tokenizer):
        raise ConfigError(f"--tokenizer-model {request.tokenizer}: no tokenizer there; name its folder or a file in it")
    source = open_source(request)
    result = _result(request, source.assets)
    recover(result.absolute())
    _check_result(request, result)
    for note in source.notes:
        say(note)
    if source.weights is None:
        _write_adapter(request, source, result)
    else:
        _write_model(request, source, source.weights, result)
    say(f"{result}: {_describe(request, source)}")
    return result


def _result(request: Request, assets: Path) -> Path:
    """``--save-dir``; or ``mg2hg`` in it if that is where config.json came from, as with MindSpeed-LLM."""
    is_original = request.load_kind == "mg" and assets.resolve() == request.save_dir.resolve()
    return request.save_dir / "mg2hg" if is_original else request.save_dir


def _check_result(request: Request, result: Path) -> None:
    target = result.resolve()
    for flag, folder in (("--load-dir", request.load_dir), ("--lora-load", request.lora_load)):
        if folder is not None and (target == folder.resolve() or target in folder.resolve().parents):
            raise ConfigError(f"--save-dir {result}: holds {flag} {folder}; name another folder")
    if request.hf_cfg_dir is not None and target == request.hf_cfg_dir.resolve():
        raise ConfigError(f"--save-dir {result}: is also --hf-cfg-dir; name another folder")
    if (result.exists() or result.is_symlink()) and not request.overwrite:
        raise ConfigError(f"--save-dir {result}: exists already; name another folder, or add --overwrite")
    if result.exists() and not result.is_dir():
        raise ConfigError(f"--save-dir {result}: is a file; name a folder")


def _write_model(request: Request, source: Source, weights: ModelWeights, result: Path) -> None:
    dtype = getattr(torch, request.dtype) if request.dtype else weights.read("model.embed_tokens.weight").dtype
    shape = source.shape
    sizes = target_sizes(shape, tp=request.tp, pp=request.pp, layers_per_chunk=request.layers_per_chunk)
    _check_space(weights, dtype, result)
    settings = {**source.changes, "dtype": str(dtype).removeprefix("torch.")}
    with _new_folder(result) as folder:
        if request.save_kind == "hf":
            tensors = ((name, weights.read(name).to(dtype)) for name in shape.hf_names)
            save_hf_folder(folder, tensors, like=source.assets, changes=settings)
        else:
            _write_megatron(request, source, weights, folder, sizes, dtype, settings)
        _copy_tokenizer(request, folder)


def _write_megatron(
    request: Request,
    source: Source,
    weights: ModelWeights,
    folder: Path,
    sizes: Sizes,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> None:
    checkpoint = folder / _ITERATION
    checkpoint.mkdir(parents=True)
    if request.legacy:
        write_legacy(checkpoint, weights, source.shape, sizes, dtype=dtype)
    else:
        write_dist(checkpoint, weights, source.shape, tp_size=sizes.tp, dtype=dtype)
    write_assets(folder, source.assets, settings)
    (folder / LATEST).write_text("1")


def _write_adapter(request: Request, source: Source, result: Path) -> None:
    adapter = source.adapter
    assert adapter is not None
    with _new_folder(result) as folder:
        save_adapter(
            folder,
            adapter.tensors.items(),
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=source.dropout,
            base=str(source.assets),
        )


def _check_space(weights: ModelWeights, dtype: torch.dtype, result: Path) -> None:
    needed = dtype.itemsize * sum(torch.Size(weights.shape(name)).numel() for name in weights.names())
    place = next(path for path in result.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(f"--save-dir {result}: the weights take {needed:,} bytes, but {free:,} are free at {place}")


@contextmanager
def _new_folder(result: Path) -> Iterator[Path]:
    """A place to write to; it gets the name ``result`` at the end, and is deleted if it does not come to that."""
    temporary = temporary_for(result.absolute())
    try:
        yield temporary / "model"
        publish(temporary / "model", result.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_tokenizer(request: Request, folder: Path) -> None:
    for file in () if request.tokenizer is None else _tokenizer_files(request.tokenizer):
        shutil.copy2(file, folder / file.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    patterns = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")
    return [file for pattern in patterns for file in folder.glob(pattern)]


def _describe(request: Request, source: Source) -> str:
    if source.weights is None:
        return "the LoRA adapters, as PEFT keeps them"
    count = f"{len(source.shape.hf_names)} tensors"
    if request.save_kind == "hf":
        return f"{count}, a Hugging Face folder"
    if request.legacy:
        return f"{count} in {_ITERATION}/mp_rank_*, for {request.tp} tensor and {request.pp} pipeline ranks"
    return f"{count} in {_ITERATION}, a distributed checkpoint, which every layout can load"
