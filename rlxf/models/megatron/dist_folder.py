"""A model in megatron's distributed checkpoint, read tensor by tensor: no process group, and whatever wrote it.

The format keeps whole tensors, whatever layout wrote them: packed query-key-value, all of gate before all of up, all
layers of one kind stacked.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rlxf.config.folders import megatron_checkpoint
from rlxf.errors import ModelError
from rlxf.models.hf_folder import HfWeights, ModelWeights
from rlxf.models.megatron.families import family_of
from rlxf.models.megatron.weights import Entry, Geometry, entries, to_full

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Where the fused kernels of Transformer Engine keep a norm's weight, which is the name that a checkpoint has.
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


class DistCheckpoint:
    """The tensors of a distributed checkpoint, by the names that they have there.

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
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """The tensor of that name, or its part of one layer.

        Raises:
            ModelError: a file is missing or damaged, or does not hold all of it.
        """
        stored = self._tensors[name]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        found = torch.empty(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != found.numel():
            raise ModelError(f"{self.folder}: {name} is not complete; copy the checkpoint again")
        try:
            self._reader.read_data(LoadPlan(items), _Into(found)).wait()
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{self.folder}: {name} cannot be read: {reason}; copy the checkpoint again") from error
        return found if layer is None else found[0]


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
            raise ModelError(f"{folder}: holds {layers} layers; config.json says more")
        if entry.kind == "vocab" and layers < self._geometry.vocab_size:
            raise ModelError(
                f"{folder}: {name} has {layers} rows; config.json says vocab_size = {self._geometry.vocab_size}"
            )


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: Any) -> Tensor:
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        return


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


class _MetadataUnpickler(pickle.Unpickler):
    """Torch keeps a checkpoint's index as a pickle; this one makes the classes of such an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, set()):
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint's index needs")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ModelError(f"{folder}: no .metadata; expected a distributed checkpoint of megatron")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ModelError(f"{path}: not the index of a distributed checkpoint")
    return metadata
