"""The live ``DPOTrainer`` of TRL on a fixed preference file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from tests.parity.fixed_data import FixedPrompt, Settings, preference_records
from tests.parity.oracle import Metrics
from tests.parity.trl_online import arguments
from tests.tiny_models import byte_tokenizer


class Recording(transformers.Trainer):
    """Keeps what one of TRL's trainers logs, at full precision."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Metrics] = []
        self._losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # Of one micro-batch, and a share of the whole: divided by the number of them, or by the tokens of all.
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # adds the trainer's own metrics
        if "grad_norm" in logs:
            self.steps.append({**logs, "loss": sum(self._losses)})
            self._losses.clear()


class RecordingDPOTrainer(Recording, DPOTrainer):
    pass


class BetaOfEpoch(RecordingDPOTrainer):
    """With the online trainer's rule for a list of betas, and a whole number as its epoch."""

    @property
    def beta(self) -> float:
        epoch = int(self.state.epoch or 0)
        listed = SimpleNamespace(_beta=list(self._betas), state=SimpleNamespace(epoch=epoch))
        return OnlineDPOTrainer.beta.fget(listed)  # type: ignore[attr-defined]

    @beta.setter
    def beta(self, value: tuple[float, ...]) -> None:
        self._betas = value


def train(
    rows: Sequence[FixedPrompt],
    policy: Path,
    reference: Path,
    settings: Settings,
    folder: Path,
    *,
    trainer_class: type[RecordingDPOTrainer] = RecordingDPOTrainer,
) -> list[Metrics]:
    """Metrics of each optimizer step, as TRL computes them."""
    trainer = trainer_class(
        model=transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=DPOConfig(
            **arguments(folder, settings),
            beta=settings.beta,
            disable_dropout=True,
            loss_type=[settings.loss_type] if isinstance(settings.loss_type, str) else list(settings.loss_type),
            loss_weights=None if settings.loss_weights is None else list(settings.loss_weights),
            label_smoothing=settings.label_smoothing,
            f_divergence_type=settings.divergence,
            f_alpha_divergence_coef=settings.alpha,
            ld_alpha=settings.ld_alpha,
            use_weighting=settings.weighting == "wpo",
        ),
        train_dataset=Dataset.from_list(preference_records(rows)),
        processing_class=byte_tokenizer(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.steps
