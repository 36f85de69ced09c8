"""TRL's live ``SFTTrainer`` and ``RewardTrainer``, with the token ids that they train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tests.parity.fixed_data import Settings
from tests.parity.oracle import Metrics
from tests.parity.trl_offline import Recording
from tests.parity.trl_online import arguments
from tests.tiny_models import byte_tokenizer

# Marks what the assistant says, its EOS included, as TRL's assistant_only_loss asks for.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}<s>{{ message.content }}:{% endif %}{% endfor %}"
)


class RecordingSFTTrainer(Recording, SFTTrainer):
    pass


class RecordingRewardTrainer(Recording, RewardTrainer):
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrlRun:
    """What a trainer logged, and its tokenized data set."""

    steps: list[Metrics]
    rows: list[dict[str, Any]]


def _run(trainer: Any) -> TrlRun:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return TrlRun(steps=trainer.steps, rows=list(trainer.train_dataset))


def train_sft(records: Sequence[dict[str, Any]], model: Path, settings: Settings, folder: Path) -> TrlRun:
    """Rows of the data set: ``input_ids`` and ``labels``, -100 where the loss does not look."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return _run(
        RecordingSFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=SFTConfig(**arguments(folder, settings), assistant_only_loss="messages" in records[0]),
            train_dataset=Dataset.from_list(list(records)),
            processing_class=tokenizer,
        )
    )


def train_reward(
    records: Sequence[dict[str, Any]], model: Path, settings: Settings, folder: Path, *, centering: float | None
) -> TrlRun:
    """Rows of the data set: ``chosen_ids``, ``rejected_ids``, and ``margin`` where the records have one."""
    return _run(
        RecordingRewardTrainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
            args=RewardConfig(
                **arguments(folder, settings), center_rewards_coefficient=centering, disable_dropout=True
            ),
            train_dataset=Dataset.from_list(list(records)),
            processing_class=byte_tokenizer(),
        )
    )
