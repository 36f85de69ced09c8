"""The door to the training backend: load a role's model, and compute log-probabilities or scores with it.

Rooms come through here, so that megatron-core is imported only in processes that hold a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlxf.config.roles import LoraConfig, RoleConfig
from rlxf.config.schema import ModelConfig
from rlxf.core.errors import ConfigError
from rlxf.core.tensors import to_device
from rlxf.core.types import Pairs, PairValues, Sequences
from rlxf.models.batching import MicroBatchLimits, my_batches, pair_groups, shared_prompt_groups
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel, reduce_over_data_parallel
from rlxf.models.sharing import Completions, completions_of, sides_of
from rlxf.platform.base import Platform, Process

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel
    from rlxf.models.megatron.packing import Packed

RoleName = Literal["actor_rollout", "ref", "reward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """What loading a model needs besides its role's section."""

    role: RoleName  # the name of that section, for messages
    shape: ModelConfig | None  # what the recipe says of the folder; None: the recipe has no such model
    seed: int
    timeout_s: int  # longest time that one collective call may take
    trust_remote_code: bool = False
    reward: bool = False  # it has a score head
    new_head: bool = False  # a folder without one gets a random one
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in backward
    lora: LoraConfig | None = None  # None: no adapters


def load_model(config: RoleConfig, settings: LoadSettings, platform: Platform, process: Process) -> MegatronModel:
    """This rank's share of the model that a role loads.

    Raises:
        ModelError: the folder does not hold such a model. ConfigError: it differs from the recipe's model section.
    """
    role, seed = settings.role, settings.seed
    if config.load is None or settings.shape is None:
        raise ConfigError(f"{role}.load and {role}.model: expected a model folder and the name of its shape, got none")
    layout = init_parallel(platform, process, sizes=ParallelSizes.of(config), seed=seed, timeout_s=settings.timeout_s)
    from rlxf.models.megatron.hf_config import check_shape
    from rlxf.models.megatron.model import MegatronModel

    model = MegatronModel(
        config.load,
        platform=platform,
        layout=layout,
        dtype=getattr(torch, config.dtype),
        reward=settings.reward,
        new_head=seed if settings.new_head else None,
        recompute=settings.recompute,
        trust_remote_code=settings.trust_remote_code,
    )
    check_shape(settings.shape, model.hf_config, role=role, name=config.model)
    if settings.lora is not None and settings.lora.lora_r:
        from rlxf.models.megatron.adapters import add_adapters

        add_adapters(model, settings.lora, seed=seed)
    return model


def token_logps(model: MegatronModel, sequences: Sequences, limits: MicroBatchLimits) -> Tensor:
    """[sum completion tokens] float32 log-probabilities of every completion token, on the CPU and on every rank.

    Without gradient; the data-parallel ranks share the work.
    """
    from rlxf.models.megatron.packing import pack_for_logps

    lengths = sequences.completion_lengths
    groups = shared_prompt_groups(sequences, limits)
    values = _over_rows(model, sequences, groups, limits, pack_for_logps, model.logps, lengths)
    return torch.cat(values) if values else torch.zeros(0)


def pair_logps(
    model: MegatronModel, pairs: Pairs, limits: MicroBatchLimits, *, ld_alpha: float | None = None
) -> PairValues:
    """Log-probabilities of both sides, summed over the completion tokens; on the CPU and on every rank.

    The same pairs in the same order and with the same limits give the same numbers as a training pass, to the bit; to
    float tolerance where a completion is in several pairs, which is computed once here. ``ld_alpha``: as ``sum_sides``
    has it.
    """
    # With ``ld_alpha`` a completion's sum depends on its partner.
    completions = completions_of(pairs) if ld_alpha is None else sides_of(pairs)

    def sums(hidden: Tensor, packed: Packed) -> Tensor:
        return sum_sides(model.logps(hidden, packed), packed.lengths, ld_alpha)

    return _pair_values(model, completions, limits, sums)


def pair_wpo_weights(model: MegatronModel, pairs: Pairs, limits: MicroBatchLimits) -> Tensor:
    """[N] float32 ``wpo_weights`` of pairs, on the CPU and on every rank."""

    def means(hidden: Tensor, packed: Packed) -> Tensor:
        return log_alignment(model, hidden, packed, model.logps(hidden, packed))

    return wpo_weights(_pair_values(model, completions_of(pairs), limits, means))


def wpo_weights(alignment: PairValues) -> Tensor:
    """[N] float32 weights of pairs under the model (WPO, Zhou et al. 2024, eq. 2), without gradient.

    A completion's weight is the geometric mean over its tokens of ``p(token) / sum of p(v)**2`` over the vocabulary: 1
    for a token that is as probable as one that the model samples is on average. A pair's weight is the product of both.

    Args:
        alignment: ``log_alignment`` of each side.
    """
    return (alignment.chosen + alignment.rejected).exp()


@torch.no_grad()
def log_alignment(model: MegatronModel, hidden: Tensor, packed: Packed, token_logps: Tensor) -> Tensor:
    """[B] mean over each completion's tokens of ``log p(token) - log sum of p(v)**2``.

    Args:
        model: the one that is trained.
        hidden: hidden states of the last stage.
        packed: the completions.
        token_logps: [sum completion tokens] what ``model.logps`` gives of them.
    """
    values = token_logps.detach() - model.log_collisions(hidden, packed)
    return sum_rows(values, packed.lengths) / packed.lengths.to(values)


def _pair_values(
    model: MegatronModel,
    completions: Completions,
    limits: MicroBatchLimits,
    compute: Callable[[Tensor, Packed], Tensor],
) -> PairValues:
    """One number for each side of pairs, from one for each completion."""
    from rlxf.models.megatron.packing import pack_for_logps

    sequences = completions.sequences
    shared = completions.are_shared
    groups = shared_prompt_groups(sequences, limits) if shared else pair_groups(len(completions.chosen))
    ones = torch.ones(len(sequences), dtype=torch.int64)
    values = _over_rows(model, sequences, groups, limits, pack_for_logps, compute, ones)
    return completions.of_pairs(torch.cat(values))


def pair_scores(model: MegatronModel, pairs: Pairs, limits: MicroBatchLimits) -> PairValues:
    """[N] reward-model scores of both sides, on the CPU and on every rank; named as the log-probabilities are."""
    from rlxf.models.megatron.packing import pack_for_scores

    both = Sequences.concat([pairs.chosen, pairs.rejected])
    ones = torch.ones(len(both), dtype=torch.int64)
    values = _over_rows(model, both, pair_groups(len(pairs)), limits, pack_for_scores, model.scores, ones)
    chosen, rejected = torch.cat(values).chunk(2)
    return PairValues(chosen=chosen, rejected=rejected)


def sequence_scores(model: MegatronModel, sequences: Sequences, limits: MicroBatchLimits) -> Tensor:
    """[B] float32 reward-model scores, on the CPU and on every rank; the data-parallel ranks share the work."""
    from rlxf.models.megatron.packing import pack_for_scores

    ones = torch.ones(len(sequences), dtype=torch.int64)
    groups = shared_prompt_groups(sequences, limits)
    return torch.cat(_over_rows(model, sequences, groups, limits, pack_for_scores, model.scores, ones))


def _over_rows(
    model: MegatronModel,
    sequences: Sequences,
    groups: Sequence[Tensor],
    limits: MicroBatchLimits,
    pack: Callable[..., Packed],
    compute: Callable[[Tensor, Packed], Tensor],
    sizes: Tensor,
) -> list[Tensor]:
    """What ``compute`` gives for each sequence, ``sizes`` ([B]) numbers each, in the order of ``sequences``."""
    from rlxf.models.megatron.passes import forward_all

    layout = model.layout
    batches = my_batches(sequences, groups, limits, dp_rank=layout.dp_rank, dp_size=layout.dp_size)
    chosen = [rows_of(groups, batch) for batch in batches]
    result = torch.zeros(int(sizes.sum()))
    places = torch.split(result, sizes.tolist())
    if chosen:
        packs = [
            pack(sequences.select(rows), layout, share_prompts=limits.share_prompts, num_tokens=limits.length)
            for rows in chosen
        ]
        found = forward_all(model, packs, compute, [int(sizes[rows].sum()) for rows in chosen])
        for rows, values in zip(chosen, found, strict=True):
            for row, value in zip(rows.tolist(), torch.split(values.cpu(), sizes[rows].tolist()), strict=True):
                places[row].copy_(value)
    # Every rank filled its own rows of a zero tensor.
    return list(torch.split(reduce_over_data_parallel(result, layout), sizes.tolist()))


def rows_of(groups: Sequence[Tensor], batch: Sequence[int]) -> Tensor:
    """The rows of some groups: all first members, then all second ones, so that a pass sees chosen before rejected."""
    longest = max(len(groups[i]) for i in batch)
    return torch.tensor([int(groups[i][k]) for k in range(longest) for i in batch if k < len(groups[i])])


def side_sums(completions: Completions, values: Tensor, ld_alpha: float | None = None) -> PairValues:
    """[N] sums over the tokens of each side of pairs, of ``values`` of the completions' tokens; as ``sum_sides``."""
    lengths = completions.sequences.completion_lengths
    if ld_alpha is None:
        return completions.of_pairs(sum_rows(values, lengths))
    sides = torch.cat([completions.chosen, completions.rejected])
    rows = torch.split(values, lengths.tolist())
    chosen, rejected = sum_sides(torch.cat([rows[side] for side in sides.tolist()]), lengths[sides], ld_alpha).chunk(2)
    return PairValues(chosen=chosen, rejected=rejected)


def sum_sides(values: Tensor, lengths: Tensor, ld_alpha: float | None = None) -> Tensor:
    """[2N] sums over the tokens of both sides of pairs: chosen sides, then rejected sides.

    Args:
        values: [sum of lengths] one per completion token.
        lengths: [2N] completion tokens.
        ld_alpha: weight of the tokens by which the longer side of a pair exceeds the shorter one (LD-DPO, Liu et al.
            2024, eq. 12); None: all tokens count the same.
    """
    if ld_alpha is None:
        return sum_rows(values, lengths)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    column = torch.arange(len(values)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    is_public = to_device(column < shared.repeat_interleave(lengths), values.device)
    return sum_rows(torch.where(is_public, values, ld_alpha * values), lengths)


def sum_rows(values: Tensor, lengths: Tensor) -> Tensor:
    """[B] sums of ``values``' consecutive rows of the given lengths ([B] int64 on the CPU)."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    column = torch.arange(len(values)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places = to_device(torch.stack([row, column]), values.device)  # made on the host, which knows the lengths
    padded = values.new_zeros(len(lengths), int(lengths.max()))
    # One write per place: deterministic on every device, unlike an atomic scatter-add.
    return padded.index_put((places[0], places[1]), values).sum(dim=1)
