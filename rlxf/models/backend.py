"""The door to the training backend: load a role's model, and compute log-probabilities or scores with it.

Rooms come through here, so that megatron-core is imported only in processes that hold a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.errors import ConfigError
from rlxf.models.megatron.parallel import init_parallel, sum_over_data_parallel
from rlxf.platform.base import Platform, Process
from rlxf.types import Sequences

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel

RoleName = Literal["actor_rollout", "ref", "reward"]


def load_model(config: RunConfig, role: RoleName, platform: Platform, process: Process) -> MegatronModel:
    """This rank's share of the model that ``role`` loads.

    Raises:
        ModelError: the folder does not hold such a model. ConfigError: it differs from the recipe's model section.
    """
    section = getattr(config, role)
    if section.load is None or section.model is None:
        raise ConfigError(f"{role}.load and {role}.model: expected a model folder and the name of its shape, got none")
    layout = init_parallel(
        platform,
        process,
        tp_size=section.tensor_model_parallel_size,
        seed=config.training.seed,
        timeout_s=config.training.stage_timeout_s,
    )
    from rlxf.models.megatron.model import MegatronModel, check_shape

    model = MegatronModel(
        section.load,
        platform=platform,
        layout=layout,
        dtype=torch.bfloat16 if section.bf16 else torch.float32,
        reward=role == "reward",
        trust_remote_code=config.training.trust_remote_code,
    )
    check_shape(config.model[section.model], model.hf_config, role=role, name=section.model)
    return model


@torch.no_grad()
def token_logps(model: MegatronModel, sequences: Sequences, *, sequences_per_forward: int) -> Tensor:
    """[sum completion tokens] float32 on the CPU, the same on every rank; the data-parallel ranks share the work."""
    from rlxf.models.megatron.packing import pack_for_logps

    lengths = sequences.completion_lengths
    result = torch.zeros(int(lengths.sum()))
    places = torch.split(result, lengths.tolist())
    for rows in _my_rows(model, len(sequences), sequences_per_forward):
        part = sequences.select(rows)
        packed = pack_for_logps(part, model.layout.device)
        values = model.logps(model.gpt(packed), packed).cpu()
        for row, value in zip(rows.tolist(), torch.split(values, part.completion_lengths.tolist()), strict=True):
            places[row].copy_(value)
    return sum_over_data_parallel(result, model.layout)  # every rank filled its own rows of a zero tensor


@torch.no_grad()
def sequence_scores(model: MegatronModel, sequences: Sequences, *, sequences_per_forward: int) -> Tensor:
    """[B] float32 reward-model scores on the CPU, the same on every rank; the data-parallel ranks share the work."""
    from rlxf.models.megatron.packing import pack_for_scores

    result = torch.zeros(len(sequences))
    for rows in _my_rows(model, len(sequences), sequences_per_forward):
        packed = pack_for_scores(sequences.select(rows), model.layout.device)
        result[rows] = model.scores(packed).cpu()
    return sum_over_data_parallel(result, model.layout)


def sum_rows(values: Tensor, lengths: Tensor) -> Tensor:
    """[B] sums of ``values``' consecutive rows of the given lengths."""
    lengths = lengths.to(values.device)
    row = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    column = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    padded = values.new_zeros(len(lengths), int(lengths.max()))
    # One write per place: deterministic on every device, unlike an atomic scatter-add.
    return padded.index_put((row, column), values).sum(dim=1)


def _my_rows(model: MegatronModel, num_rows: int, rows_per_forward: int) -> list[Tensor]:
    mine = torch.arange(num_rows)[model.layout.dp_rank :: model.layout.dp_size]
    return list(torch.split(mine, rows_per_forward)) if mine.numel() else []
