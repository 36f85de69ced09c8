"""The live ``OnlineDPOTrainer`` of TRL on fixed completions and scores.

Only sampling is replaced, at its lowest level: the model's ``generate`` returns the recorded completions of the prompts
that it is given. Tokenization, padding, cutting at the EOS, scoring, the EOS penalty, pairing, the loss, accumulation,
clipping and the optimizer are TRL's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.parity.fixed_data import FixedPrompt, Settings
from tests.parity.oracle import Metrics
from tests.tiny_models import PAD, byte_tokenizer


class RecordedSampler:
    """Stands in for ``model.generate``; finds the recorded completions by the prompt's tokens, not by position."""

    def __init__(self, rows: Sequence[FixedPrompt]) -> None:
        self._rows = {tuple(row.token_ids): row for row in rows}

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """[B, T] prompts, padded on the left, to [B, T + longest completion]; second samples fill the second half."""
        sampled: list[list[int]] = []
        for index, (tokens, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            row = self._rows[tuple(tokens[mask.bool()].tolist())]
            sampled.append(row.completions[index * 2 // len(input_ids)].token_ids)
        longest = max(map(len, sampled))
        padded = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sampled])
        return torch.cat([input_ids, padded], dim=1)


class RecordedScores:
    """TRL's reward function: the recorded score of each completion, found by its prompt and its tokens."""

    __name__ = "recorded_scores"

    def __init__(self, rows: Sequence[FixedPrompt]) -> None:
        self._scores = {(row.text, tuple(c.token_ids)): c.score for row in rows for c in row.completions}

    def __call__(self, *, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [
            self._scores[prompt, tuple(token for token in ids if token != PAD)]
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]


class FixedOnlineTrainer(OnlineDPOTrainer):
    """Keeps what TRL logs, at full precision (its own loss is rounded to four digits)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Metrics] = []
        self._losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # of one micro-batch, divided by the number of them
        self._losses.append(loss.item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:  # the summary at the end of training has none
            self.steps.append({**logs, "loss": sum(self._losses)})
            self._losses.clear()
        super().log(logs, start_time)


class AveragingOnlineTrainer(FixedOnlineTrainer):
    """The same with its accumulation repaired: gradients averaged over micro-batches, as ``DPOTrainer`` does."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        backward = self.accelerator.backward
        self.accelerator.backward = lambda loss, **rest: backward(loss / self.args.gradient_accumulation_steps, **rest)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.accelerator.backward = backward


def arguments(folder: Path, settings: Settings) -> dict[str, Any]:
    """What all of TRL's trainers are told: fp32 on the CPU, AdamW, constant rate, file order, a log per step."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": settings.num_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip_grad,
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def train(
    rows: Sequence[FixedPrompt],
    policy: Path,
    reference: Path,
    settings: Settings,
    folder: Path,
    *,
    trainer_class: type[FixedOnlineTrainer] = FixedOnlineTrainer,
) -> list[Metrics]:
    """Metrics of each optimizer step, as TRL computes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.generate = RecordedSampler(rows)
    trainer = trainer_class(
        model=model,
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        reward_funcs=RecordedScores(rows),
        args=OnlineDPOConfig(
            **arguments(folder, settings),
            beta=list(settings.beta) if isinstance(settings.beta, tuple) else settings.beta,
            disable_dropout=True,
            loss_type=settings.loss_type,
            missing_eos_penalty=settings.missing_eos_penalty or None,
            max_new_tokens=settings.max_new_tokens,
        ),
        train_dataset=Dataset.from_dict({"prompt": [row.text for row in rows]}),
        processing_class=byte_tokenizer(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.steps
