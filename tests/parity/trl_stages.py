"""TRL's live ``SFTTrainer`` and ``RewardTrainer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
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


def tokenizer_of_stages() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _run(trainer: Any) -> list[Metrics]:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    steps: list[Metrics] = trainer.steps
    return steps


def train_sft(records: Sequence[dict[str, Any]], model: Path, settings: Settings, folder: Path) -> list[Metrics]:
    """Metrics of each optimizer step. Rows of prompt and completion, or of chat messages."""
    return _run(
        RecordingSFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=SFTConfig(**arguments(folder, settings), assistant_only_loss="messages" in records[0]),
            train_dataset=Dataset.from_list(list(records)),
            processing_class=tokenizer_of_stages(),
        )
    )


def train_reward(
    records: Sequence[dict[str, Any]], model: Path, settings: Settings, folder: Path, *, centering: float | None
) -> list[Metrics]:
    """Metrics of each optimizer step. Rows of prompt, chosen and rejected; ``margin`` where they have one."""
    return _run(
        RecordingRewardTrainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
            args=RewardConfig(
                **arguments(folder, settings), center_rewards_coefficient=centering, disable_dropout=True
            ),
            train_dataset=Dataset.from_list(list(records)),
            processing_class=tokenizer_of_stages(),
        )
    )
