"""Configs and batches for tests that build roles directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.config.roles import ActorConfig, ReferenceConfig, RewardConfig, RoleConfig
from rlxf.config.schema import ModelConfig, RunConfig, TrainingConfig
from rlxf.core.types import (
    Examples,
    Metrics,
    OnlinePairs,
    Pairs,
    PairValues,
    ReferencedPairs,
    RewardPairs,
    Sequences,
)
from rlxf.update.objective import MOMENTS
from tests.tiny_models import VOCAB

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=VOCAB,
    max_position_embeddings=512,
    untie_embeddings_and_output_weights=True,
)


def run_config(
    folder: Path, *, reward: Path | None = None, stage: str = "ray_online_dpo", num_layers: int = 2, **actor: Any
) -> RunConfig:
    """A recipe around the model in ``folder`` (see tests/tiny_models.py).

    ``actor`` are keys of actor_rollout; those that every role has are set for all roles.
    """
    settings = {"model": "tiny", "load": str(folder), "micro_batch_size": 4, "lr": 1e-3} | actor
    role = {key: settings[key] for key in RoleConfig.model_fields if key in settings}
    return RunConfig(
        training=TrainingConfig(stage=stage, train_iters=10),  # type: ignore[arg-type]
        model={"tiny": MODEL.model_copy(update={"num_layers": num_layers})},
        actor_rollout=ActorConfig(**settings),
        ref=ReferenceConfig(**role),
        reward=RewardConfig(**role | {"load": str(reward or folder)}),
    )


def random_rows(count: int, low: int, high: int, generator: torch.Generator) -> list[list[int]]:
    """``count`` rows of ``low`` to ``high - 1`` ordinary token ids."""
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def random_pairs(count: int, seed: int = 0) -> Pairs:
    """Pairs of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = random_rows(count, 2, 12, generator)
    sides = [Sequences.from_rows(prompts, random_rows(count, 1, 30, generator)) for _ in range(2)]
    return Pairs(chosen=sides[0], rejected=sides[1])


def online_pairs(pairs: Pairs, chosen_engine_logps: Tensor, rejected_engine_logps: Tensor) -> OnlinePairs:
    """The pairs as an engine with these log-probs would have sampled them, each of a prompt of its own."""
    number = len(pairs)
    return OnlinePairs(
        chosen=pairs.chosen,
        rejected=pairs.rejected,
        row_ids=torch.arange(number),
        margin=torch.ones(number),
        policy_version=torch.zeros(number, dtype=torch.int64),
        chosen_engine_logps=chosen_engine_logps,
        rejected_engine_logps=rejected_engine_logps,
        prompt_index=torch.arange(number),
        chosen_rows=2 * torch.arange(number),
        rejected_rows=2 * torch.arange(number) + 1,
        weight=torch.ones(number),
    )


def referenced(pairs: Pairs, seed: int = 0) -> ReferencedPairs:
    """Pairs with made-up reference log-probs, for tests that have no reference model."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (-40 + 5 * torch.randn(len(pairs), generator=generator) for _ in range(2))
    return ReferencedPairs(pairs=pairs, reference=PairValues(chosen=chosen, rejected=rejected))


def random_reward_pairs(count: int, seed: int = 0) -> RewardPairs:
    """The same pairs with margins."""
    pairs = random_pairs(count, seed)
    margin = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return RewardPairs(chosen=pairs.chosen, rejected=pairs.rejected, margin=margin)


def random_examples(count: int, seed: int = 0) -> Examples:
    """Of unequal lengths, with tokens that do not count; every second row shares its prompt with the one before."""
    generator = torch.Generator().manual_seed(seed)
    prompts = random_rows(count, 2, 12, generator)
    prompts = [prompts[row - row % 2] for row in range(count)]
    sequences = Sequences.from_rows(prompts, random_rows(count, 2, 30, generator))
    lengths = sequences.completion_lengths
    counted = torch.rand(int(lengths.sum()), generator=generator) < 0.7
    counted[lengths.cumsum(0) - lengths] = True  # a completion begins with a token that counts
    return Examples(sequences=sequences, counted=counted)


def without_moments(metrics: Metrics) -> Metrics:
    """An evaluation's numbers but those that only standard errors are made of."""
    return {name: value for name, value in metrics.items() if not name.startswith(MOMENTS)}
