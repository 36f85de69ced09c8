"""Training state on disk: megatron's distributed checkpoint, which any other layout can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from rlxf.models.megatron.adapters import sharded_adapters
from rlxf.models.megatron.optimizer import TrainableModel


def save(folder: Path, trainable: TrainableModel) -> None:
    """Write parameters (with LoRA: adapters) and optimizer state into ``folder``, which exists; every rank calls it.

    The entry script needs an ``if __name__ == "__main__"`` guard: the writer spawns a process.
    """
    dist_checkpointing.save(_state(trainable, is_loading=False), str(folder))


def load(folder: Path, trainable: TrainableModel) -> None:
    """Take over parameters and optimizer state that ``save`` wrote, whatever layout wrote them."""
    state = dist_checkpointing.load(_state(trainable, is_loading=True), str(folder))
    for name, _, chunk in _chunks(trainable):
        chunk.load_state_dict(state[name], strict=not trainable.model.adapter_ranks)
    trainable.optimizer.load_state_dict(state["optimizer"])


def _state(trainable: TrainableModel, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model: dict[str, Any] = {}
    for name, index, chunk in _chunks(trainable):
        if trainable.model.adapter_ranks:  # the base is frozen: it is the folder that the recipe loads
            model[name] = sharded_adapters(trainable.model, index)
        else:
            model[name] = chunk.sharded_state_dict(metadata=metadata)
    optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}


def _chunks(trainable: TrainableModel) -> list[tuple[str, int, Any]]:
    """Every chunk of this rank's model: its name in the state, its number, and the module."""
    models = [chunk.module for chunk in trainable.chunks]
    return [("model" if len(models) == 1 else f"model{i}", i, model) for i, model in enumerate(models)]
