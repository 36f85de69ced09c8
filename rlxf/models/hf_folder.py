"""Hugging Face model folders: reading tensors by name, and writing a folder that ``transformers`` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.core.files import new_folder
from rlxf.core.model_folder import assets_folder

_SHARD_BYTES = 5 * 2**30
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")
_COPIED = (*_TOKENIZER, "generation_config.json")


class ModelWeights(Protocol):
    """The full tensors of a model by their Hugging Face names, from any kind of files."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> set[str]: ...

    def read(self, name: str) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class HfWeights:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of = _tensor_files(self.folder)
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in the file's dtype.

        Raises:
            ModelError: no file of the folder holds it.
        """
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data. Raises as ``read`` does."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: no tensor {name!r}; the folder holds another kind of model")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(self.folder / file)
        return self._open[file]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def _tensor_files(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        missing = sorted({file for file in files.values() if not (folder / file).is_file()})
        if missing:
            raise ModelError(f"{folder}: {index.name} names {', '.join(missing)}, which is not there; copy it again")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        old = " (convert pytorch_model.bin to safetensors)" if (folder / "pytorch_model.bin").is_file() else ""
        raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{old}")
    return dict.fromkeys(_open_safetensors(single).keys(), single.name)


def load_hf_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The ``transformers`` config of a model folder.

    Raises:
        ModelError: there is no such folder, or its ``config.json`` cannot be used.
    """
    from transformers import AutoConfig

    path = assets_folder(Path(folder))
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; `load` must name a Hugging Face model folder")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in it; `load` must name a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}/config.json: {str(error).splitlines()[0]}") from error


def save_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    changes: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write weights with the config and tokenizer of ``like``; complete or not there at all.

    Args:
        folder: an older one of that name is replaced, when the new one is on disk.
        tensors: Hugging Face names and full tensors, one at a time.
        like: the model folder that the run started from.
        changes: of ``config.json``.
        extra: adds files of its own to the folder that it is given.
    """
    with new_folder(folder) as temporary:
        _write_shards(temporary, tensors)
        write_assets(temporary, like, changes)
        if extra is not None:
            extra(temporary)


def write_assets(folder: Path, like: Path, changes: Mapping[str, Any]) -> None:
    """Write everything of a model folder but its weights: ``config.json``, tokenizer, settings of generation.

    Args:
        folder: where to.
        like: the model folder that they are taken from.
        changes: of ``config.json``.
    """
    like = assets_folder(like)
    settings = json.loads((like / "config.json").read_text())
    settings.pop("torch_dtype", None)
    settings |= changes
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for pattern in _COPIED:
        for source in like.glob(pattern):
            shutil.copy2(source, folder / source.name)


def remove_tokenizer(folder: Path) -> None:
    """Delete a model folder's tokenizer files, so that they do not stay beside those of another tokenizer."""
    for pattern in _TOKENIZER:
        for path in folder.glob(pattern):
            path.unlink()


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    current: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(current, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(current))
        current.clear()

    for name, tensor in tensors:
        if current and size + tensor.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        current[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
