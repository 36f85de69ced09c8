"""Megatron's loader of distributed checkpoints with readers that run no code of a file.

Its own readers unpickle the index and every object with all installed classes, so a checkpoint from somebody else could
run a command. These read tensors and plain values only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy

from rlxf.core.errors import ModelError
from rlxf.models.megatron.dist_folder import DistCheckpoint, Part, read_common


class RestrictedTensors(LoadShardedStrategy):  # type: ignore[misc]
    """Each rank reads its own parts of tensors and objects, without communication."""

    can_handle_sharded_objects = True

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """The same nested state, each part of it read. Raises ``ModelError`` if one cannot be."""
        checkpoint, parts = DistCheckpoint(Path(checkpoint_dir)), list[Part]()
        for holder, key, leaf in _leaves(sharded_state_dict):
            if isinstance(leaf, ShardedObject):
                holder[key] = _only(checkpoint, leaf.unique_key)
            else:
                parts.append(_part(checkpoint, leaf))
                holder[key] = leaf.data
        checkpoint.read_parts(parts)
        return sharded_state_dict

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError  # asked for by megatron's own tools only

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """The caller has checked it."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Only one version exists."""


class RestrictedCommon(LoadCommonStrategy):  # type: ignore[misc]
    """What is saved once for all ranks."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return read_common(Path(checkpoint_dir))

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError  # the other strategy reads them

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """The caller has checked it."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Only one version exists."""


def _leaves(state: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Container, key and value of every leaf of nested dicts and lists."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield state, key, value


def _only(checkpoint: DistCheckpoint, name: str) -> Any:
    """The object of that name; megatron saves it as a list of one."""
    found = checkpoint.read_object(name)
    if not isinstance(found, list) or len(found) != 1:
        raise ModelError(f"{checkpoint.folder}: {name} is a {type(found).__name__}; expected a list of one")
    return found[0]


def _part(checkpoint: DistCheckpoint, tensor: ShardedTensor) -> Part:
    """The place of a rank's tensor in the checkpoint. A tensor without memory gets some, filled with zeros.

    Only a tensor whose stored shape may differ (a vocabulary padded for another number of ranks) needs the zeros.
    """
    name, flexible = tensor.key, tensor.allow_shape_mismatch
    if name in checkpoint and checkpoint.shape(name) != tensor.global_shape and not flexible:
        raise ModelError(
            f"{checkpoint.folder}: {name} has the shape {checkpoint.shape(name)}; the recipe's model has "
            f"{tensor.global_shape}"
        )
    tensor.init_data("cpu")
    tensor.data = tensor.data.detach()
    if flexible:
        tensor.data.zero_()
    target = tensor.data[(None,) * tensor.prepend_axis_num]
    return Part(name, tensor.global_offset, target, may_be_shorter=flexible)
