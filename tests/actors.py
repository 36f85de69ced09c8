"""Actors of any stage in this process, and the same numbers from plain Hugging Face models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.types import Batch, Metrics, Sequences
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from tests.settings import run_config


def actor(folder: Path, stage: str, **settings: Any) -> MegatronActor:
    """``settings`` are keys of actor_rollout."""
    return build_actor(run_config(folder, stage=stage, **settings), get_platform("cpu"), Process())


def weights(of: MegatronActor) -> dict[str, Tensor]:
    """A copy of all of them, by Hugging Face names."""
    return {name: value.clone() for name, value in of.model.export([name for name, _ in of.model.exported_shapes()])}


def one_step(folder: Path, stage: str, batch: Batch, **settings: Any) -> tuple[Metrics, dict[str, Tensor]]:
    """Report and weights after one optimizer step on the whole batch.

    With so large an epsilon the first Adam step is nearly the gradient itself, so weights show gradients.
    """
    trained = actor(folder, stage, **{"ppo_mini_batch_size": len(batch), "lr": 0.1, "adam_eps": 0.1} | settings)
    return trained.update(batch, 0), weights(trained)


def assert_equal_steps(found: tuple[Metrics, dict[str, Tensor]], expected: tuple[Metrics, dict[str, Tensor]]) -> None:
    """The same but for the order of fp32 sums."""
    assert set(found[0]) == set(expected[0])
    for name, value in expected[0].items():
        assert abs(found[0][name] - value) <= max(1e-5 * abs(value), 1e-6), name
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def hf_token_logps(model: Any, sequences: Sequences) -> list[Tensor]:
    """Log-probabilities of each row's completion tokens, a forward pass a row."""
    found = []
    for prompt, completion in zip(sequences.prompt_rows(), sequences.completion_rows(), strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def hf_sums(model: Any, sequences: Sequences) -> Tensor:
    """[B] log-probabilities of the completions."""
    return torch.stack([row.sum() for row in hf_token_logps(model, sequences)])
