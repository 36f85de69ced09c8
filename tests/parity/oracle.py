"""A DPO step in plain torch on a Hugging Face model: no padding, no batching, one sequence per forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from tests.parity.fixed_data import Settings, TokenPair

Metrics = dict[str, float]


def load_model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def completion_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probability of the whole completion after the prompt."""
    tokens = torch.tensor([prompt + completion])
    logps = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # [completion tokens, V]
    return logps.gather(1, tokens[0, len(prompt) :, None]).sum()


def pair_loss(log_ratio: Tensor, settings: Settings) -> Tensor:
    """Loss of one pair. ``log_ratio``: chosen minus rejected, each policy minus reference."""
    if settings.loss_type == "sigmoid":
        return -torch.nn.functional.logsigmoid(settings.beta * log_ratio)
    if settings.loss_type == "hinge":
        return torch.relu(1 - settings.beta * log_ratio)
    assert settings.loss_type == "ipo", f"the oracle does not know {settings.loss_type}"
    return (log_ratio - 1 / (2 * settings.beta)) ** 2


def train(
    steps: Iterable[Sequence[TokenPair]], policy: Path, reference: Path, settings: Settings, *, per_token: bool = False
) -> list[Metrics]:
    """Metrics of each step, before its update. ``per_token``: log-ratios are divided by their completion's length."""
    model, frozen = load_model(policy), load_model(reference)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},  # norms do not decay
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    return [_step(model, frozen, optimizer, pairs, settings, per_token) for pairs in steps]


def _step(
    model: torch.nn.Module,
    frozen: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[TokenPair],
    settings: Settings,
    per_token: bool,
) -> Metrics:
    rows: list[Metrics] = []
    for pair in pairs:
        logps = [completion_logp(model, pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        with torch.no_grad():
            base = [completion_logp(frozen, pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        ratios = [a - b for a, b in zip(logps, base, strict=True)]
        lengths = (len(pair.chosen), len(pair.rejected)) if per_token else (1, 1)
        loss = pair_loss(ratios[0] / lengths[0] - ratios[1] / lengths[1], settings)
        (loss / len(pairs)).backward()
        rewards = [settings.beta * ratio.item() for ratio in ratios]
        rows.append(
            {
                "loss": loss.item(),
                "logps/chosen": logps[0].item(),
                "logps/rejected": logps[1].item(),
                "rewards/chosen": rewards[0],
                "rewards/rejected": rewards[1],
                "rewards/margins": rewards[0] - rewards[1],
                "rewards/accuracies": float(rewards[0] > rewards[1]),
                "objective/kl": sum(ratio.item() for ratio in ratios) / 2,
                "objective/entropy": -sum(logp.item() for logp in logps) / 2,
            }
        )
    limit = settings.clip_grad or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"grad_norm": grad_norm.item()}
