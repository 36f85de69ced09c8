"""Losses without a reference, which ``DPOTrainer`` lacks: this project against TRL's live experimental trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.parity import ours
from tests.parity.compare import assert_parity, excess
from tests.parity.fixed_data import FixedPrompt, Settings, preference_records
from tests.parity.oracle import Metrics
from tests.parity.trl_offline import Recording
from tests.parity.trl_online import arguments
from tests.tiny_models import byte_tokenizer

Folders = tuple[Path, Path]
NAMES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class RecordingCPOTrainer(Recording, CPOTrainer):
    pass


class RecordingORPOTrainer(Recording, ORPOTrainer):
    pass


def train_trl(trainer_class: type[Any], config: Any, rows: list[FixedPrompt], policy: Path) -> list[Metrics]:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None  # these two trainers put one in front of every prompt
    trainer = trainer_class(
        model=transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(preference_records(rows)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    steps: list[Metrics] = trainer.steps
    return steps


def train_here(
    rows: list[FixedPrompt], folders: Folders, settings: Settings, folder: Path, **keys: Any
) -> list[Metrics]:
    recipe = ours.offline_recipe(rows, *folders, settings, folder)
    del recipe["ref"]
    recipe["actor_rollout"] |= keys
    return ours.train(recipe, folder / "run")


@pytest.mark.parametrize(("micro_batch_size", "smoothing"), [(8, 0.0), (4, 0.1)])
def test_every_step_of_simpo_equals_trl(
    micro_batch_size: int, smoothing: float, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type="simpo", beta=2.0, micro_batch_size=micro_batch_size, label_smoothing=smoothing)
    keys = {"beta": settings.beta, "simpo_gamma": 0.7, "label_smoothing": smoothing, "cpo_alpha": 0.0}
    config = CPOConfig(**arguments(tmp_path, settings), **keys, loss_type="simpo", disable_dropout=True)
    mine = train_here(rows, folders, settings, tmp_path, simpo_gamma=0.7)
    theirs = train_trl(RecordingCPOTrainer, config, rows, folders[0])
    assert_parity(mine, theirs, steps=settings.num_steps, names=NAMES)


def test_orpo_takes_the_likelihood_of_the_completion_and_trl_that_of_the_prompt_too(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """The odds ratio is the same; the other term is the paper's here, so the curves differ after the first step."""
    settings = Settings(loss_type="orpo", beta=0.5, num_steps=1)
    config = ORPOConfig(**arguments(tmp_path, settings), beta=settings.beta, disable_dropout=True)
    (mine,) = train_here(rows, folders, settings, tmp_path)
    (theirs,) = train_trl(RecordingORPOTrainer, config, rows, folders[0])
    assert_parity([mine], [theirs], steps=1, names=NAMES[2:])
    papers = -theirs["logps/chosen"] - settings.beta * theirs["log_odds_ratio"]  # its logps are means over tokens
    assert excess(mine["loss"], papers) <= 1
    assert excess(mine["loss"], theirs["loss"]) > 100
