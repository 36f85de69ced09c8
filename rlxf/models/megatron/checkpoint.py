"""Training state on disk: megatron's distributed checkpoint, which any other layout can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from rlxf.models.megatron.optimizer import TrainableModel


def save(folder: Path, trainable: TrainableModel) -> None:
    """Write parameters and optimizer state into ``folder``, which exists; every rank of the role calls it.

    The entry script needs an ``if __name__ == "__main__"`` guard: the writer spawns a process.
    """
    dist_checkpointing.save(_state(trainable, is_loading=False), str(folder))


def load(folder: Path, trainable: TrainableModel) -> None:
    """Take over parameters and optimizer state that ``save`` wrote, whatever layout wrote them."""
    state = dist_checkpointing.load(_state(trainable, is_loading=True), str(folder))
    for name, chunk in _chunks(trainable):
        chunk.load_state_dict(state[name])
    trainable.optimizer.load_state_dict(state["optimizer"])


def _state(trainable: TrainableModel, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(trainable)}
    optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}


def _chunks(trainable: TrainableModel) -> list[tuple[str, Any]]:
    """Every chunk of this rank's model, by its name in the state."""
    models = [chunk.module for chunk in trainable.chunks]
    return [("model" if len(models) == 1 else f"model{i}", model) for i, model in enumerate(models)]
