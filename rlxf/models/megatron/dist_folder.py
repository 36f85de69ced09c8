"""A model in megatron's distributed checkpoint, read tensor by tensor, without a process group, from any layout.

The format keeps whole tensors, the same for every layout that wrote them: packed query-key-value, all of gate before
all of up, all
layers of one kind stacked.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rlxf.core.errors import ModelError
from rlxf.core.model_folder import megatron_checkpoint
from rlxf.models.hf_folder import HfWeights, ModelWeights
from rlxf.models.megatron.families import family_of
from rlxf.models.megatron.weights import Entry, Geometry, entries, to_full

FORMAT = "metadata.json"  # says which of megatron's formats the files have
TORCH_DIST = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_INDEX = ".metadata"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Checkpoints name a norm's weight after the place where Transformer Engine's fused kernels keep it.
_STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def open_weights(folder: str | Path, hf_config: Any) -> ModelWeights:
    """The tensors of a model folder: safetensors, or a distributed checkpoint beside its ``config.json``.

    Raises:
        ModelError: it holds neither, or one that cannot be read.
    """
    checkpoint = megatron_checkpoint(Path(folder))
    return HfWeights(folder) if checkpoint is None else DistWeights(checkpoint, hf_config)


def stored_name(parameter: str) -> tuple[str, int | None]:
    """Name in a checkpoint and layer of a parameter of the whole model; None for one that is not in a layer."""
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return parameter, None
    return f"decoder.layers.{_STORED.get(match[2], match[2])}", int(match[1])


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stored tensor, and the memory that it is read into."""

    name: str
    offsets: tuple[int, ...]  # where it begins in the stored tensor
    target: Tensor  # of as many axes as the stored tensor; its shape says how much is read
    may_be_shorter: bool = False  # what the stored tensor lacks stays unchanged in ``target``


class DistCheckpoint:
    """What a distributed checkpoint holds, by the names that it has there. Reading it runs no code of its files.

    Raises:
        ModelError: there is none in the folder, or its index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if any(folder.glob("mp_rank_*")):
            raise ModelError(
                f"{folder}: is in Megatron's older layout (mp_rank_*); convert it: python scripts/convert_ckpt.py "
                f"--load-model-type mg --save-model-type hf --load-dir {folder} --hf-cfg-dir <folder with config.json> "
                "--save-dir <new folder>"
            )
        self.folder = folder
        metadata = _read_metadata(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        found = metadata.state_dict_metadata
        self._tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        self._objects = {name for name, entry in found.items() if isinstance(entry, BytesStorageMetadata)}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """The tensor of that name, or its part of one layer. Raises as ``read_parts`` does."""
        stored = self._tensors[name]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        found = torch.empty(sizes, dtype=stored.properties.dtype)
        self.read_parts([Part(name, tuple(offsets), found)])
        return found if layer is None else found[0]

    def read_parts(self, parts: Iterable[Part]) -> None:
        """Read each part into its target, file by file.

        Raises:
            ModelError: a file is missing or damaged, or does not hold all of a part.
        """
        planner, by_file = _Into(), dict[str, list[ReadItem]]()
        for part in parts:
            if part.name not in self:
                raise ModelError(f"{self.folder}: no tensor {part.name!r}; it holds another kind of model")
            stored = self._tensors[part.name]
            sizes = part.target.shape
            chunk = ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=sizes)
            items = create_read_items_for_chunk_list(part.name, stored, [chunk])
            if sum(item.lengths.numel() for item in items) != sizes.numel() and not part.may_be_shorter:
                raise ModelError(f"{self.folder}: {part.name} is not complete; copy the checkpoint again")
            for item in items:
                planner.targets[id(item)] = part.target
                by_file.setdefault(self._file_of(item.storage_index), []).append(item)
        for file, items in by_file.items():
            self._read(file, items, planner)

    def read_object(self, name: str) -> Any:
        """What was saved under that name besides tensors: plain values and tensors.

        Raises:
            ModelError: it is missing or damaged, or is made of something else.
        """
        if name not in self._objects:
            raise ModelError(f"{self.folder}: no {name!r}; it holds another kind of model")
        index, start = MetadataIndex(name), torch.Size([0])
        item = ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=index,
            dest_offsets=start,
            storage_index=index,
            storage_offsets=start,
            lengths=start,
        )
        planner = _Into()
        self._read(self._file_of(index), [item], planner)
        return planner.objects[name]

    def _file_of(self, index: MetadataIndex) -> str:
        found = self._reader.storage_data.get(index)
        if found is None:
            raise ModelError(f"{self.folder / _INDEX}: names no file for {index.fqn}")
        file: str = found.relative_path
        return file

    def _read(self, file: str, items: list[ReadItem], planner: _Into) -> None:
        planner.num_read = 0
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except _DAMAGED as error:
            name = items[min(planner.num_read, len(items) - 1)].dest_index.fqn
            raise ModelError(f"{self.folder / file}: {name} cannot be read: {_reason(error)}") from error


class DistWeights:
    """The full tensors of a model by their Hugging Face names.

    Args:
        folder: the checkpoint.
        hf_config: the ``transformers`` config that fits it.

    Raises:
        ModelError: the checkpoint holds another kind of model.
    """

    def __init__(self, folder: Path, hf_config: Any) -> None:
        self._checkpoint = DistCheckpoint(folder)
        self._geometry = Geometry.of(hf_config)
        reward = "score" in self._checkpoint
        table = entries(
            range(hf_config.num_hidden_layers),
            family_of(hf_config, str(folder)),
            first=True,
            last=True,
            tied=bool(hf_config.tie_word_embeddings) and not reward,
            reward=reward,
        )
        self._place: dict[str, tuple[Entry, int]] = {}
        for entry in table:
            self._check(entry)
            self._place |= {name: (entry, index) for index, name in enumerate(entry.hf_names)}
        self._newest: tuple[Entry, list[Tensor]] | None = None  # what several names are read from, one after another

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> set[str]:
        return set(self._place)

    def read(self, name: str) -> Tensor:
        """The tensor of that name. Raises ``ModelError`` if there is none, or its file is damaged."""
        entry, index = self._find(name)
        if self._newest is None or self._newest[0] is not entry:
            stored = self._checkpoint.read(*self._stored(entry))
            self._newest = (entry, to_full(entry.kind, [stored], self._geometry))
        return self._newest[1][index].contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        entry, index = self._find(name)
        return tuple(to_full(entry.kind, [self._empty(entry)], self._geometry)[index].shape)

    def _find(self, name: str) -> tuple[Entry, int]:
        if name not in self._place:
            raise ModelError(f"{self._checkpoint.folder}: no tensor {name!r}; it holds another kind of model")
        return self._place[name]

    def _stored(self, entry: Entry) -> tuple[str, int | None]:
        """Where a parameter is; each layer may also have tensors of its own, or norms their plain names."""
        stacked, layer = stored_name(entry.parameter)
        if layer is None or stacked in self._checkpoint:
            return stacked, layer
        own = stacked.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
        return (own if own in self._checkpoint else entry.parameter), None

    def _empty(self, entry: Entry) -> Tensor:
        name, layer = self._stored(entry)
        shape = self._checkpoint.shape(name)
        return torch.empty(shape if layer is None else shape[1:], device="meta")

    def _check(self, entry: Entry) -> None:
        folder, (name, layer) = self._checkpoint.folder, self._stored(entry)
        if name not in self._checkpoint:
            what = ", ".join(entry.hf_names)
            lora = any(".lora_A." in other for other in self._checkpoint)
            raise ModelError(
                f"{folder}: holds LoRA adapters only; merge them: scripts/convert_ckpt.py --load-model-type mg "
                f"--save-model-type hf --load-dir {folder} --save-dir <new folder>"
                if lora
                else f"{folder}: no {name}, which {what} would come from; config.json is that of another model"
            )
        layers = self._checkpoint.shape(name)[0]
        if layer is not None and layer >= layers:
            raise ModelError(f"{folder}: holds {layers} layers; config.json expects more")
        if entry.kind == "vocab" and layers < self._geometry.vocab_size:
            raise ModelError(
                f"{folder}: {name} has {layers} rows; config.json has vocab_size = {self._geometry.vocab_size}"
            )


class _Into(DefaultLoadPlanner):
    """Reads tensors into their targets, and unpickles objects of the types that torch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: dict[int, Tensor] = {}  # by the id of an item
        self.objects: dict[str, Any] = {}
        self.num_read = 0  # items of the newest plan

    def resolve_tensor(self, read_item: Any) -> Tensor:
        return narrow_tensor_by_index(self.targets[id(read_item)], read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        self.num_read += 1

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)
        self.num_read += 1


_MODULE = "torch.distributed.checkpoint."
_ALLOWED: dict[str, set[str]] = {
    f"{_MODULE}metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    f"{_MODULE}planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    f"{_MODULE}filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
# The errors of torch's reader and of an unpickler on a damaged or foreign file.
_DAMAGED = (
    *(OSError, RuntimeError, EOFError, LookupError, AssertionError, ValueError, TypeError, AttributeError),
    *(ImportError, MemoryError, pickle.UnpicklingError),
)


class _MetadataUnpickler(pickle.Unpickler):
    """Torch keeps a checkpoint's index as a pickle; this one makes the classes of such an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, set()):
            raise ValueError(_asks_for(f"{module}.{name}"))
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    path = folder / _INDEX
    if not path.is_file():
        raise ModelError(f"{folder}: no {_INDEX}; expected a distributed checkpoint of megatron")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _DAMAGED as error:
        raise ModelError(f"{path}: cannot be read: {_reason(error)}") from error
    if not isinstance(metadata, Metadata):
        raise ModelError(f"{path}: not the index of a distributed checkpoint")
    try:
        names = {str(found.relative_path) for found in metadata.storage_data.values()}
        metadata.state_dict_metadata.items()
    except AttributeError as error:
        raise ModelError(f"{path}: not the index of a distributed checkpoint ({error})") from error
    for name in sorted(names):
        if Path(name).name != name:
            raise ModelError(f"{path}: names {name}, which is outside the checkpoint; do not use this checkpoint")
    return metadata


def read_common(folder: Path) -> dict[str, Any]:
    """What megatron saves once for all ranks: plain values and tensors.

    Raises:
        ModelError: the file is missing or damaged, or asks for something else.
    """
    path = folder / "common.pt"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ModelError(f"{path}: cannot be read: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}; expected a dict")
    return found


def _asks_for(name: str) -> str:
    return f"it asks for {name}, which no checkpoint needs; do not use it"


def _reason(error: BaseException) -> str:
    asked = re.search(r"GLOBAL `?([\w.]+)", str(error))  # torch's words
    if asked is not None:
        return _asks_for(asked[1])
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return first if first.startswith("it asks for") else f"{first}; copy the checkpoint again"
