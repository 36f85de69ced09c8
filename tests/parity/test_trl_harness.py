"""The two yardsticks agree: live TRL, as the comparisons drive it, and a DPO step written out in plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import oracle, trl_offline, trl_online
from tests.parity.compare import assert_parity
from tests.parity.fixed_data import FixedPrompt, Settings, best_first, preference_pairs, steps_of

Folders = tuple[Path, Path]


def oracle_online(rows: list[FixedPrompt], folders: Folders, settings: Settings) -> list[oracle.Metrics]:
    pairs = [best_first(row, penalty=settings.missing_eos_penalty) for row in rows]
    return oracle.train(steps_of(pairs, settings), *folders, settings)


@pytest.mark.parametrize(("loss_type", "value"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_oracle_gives_the_closed_form_where_policy_and_reference_are_equal(
    loss_type: str, value: float, rows: list[FixedPrompt], folders: Folders
) -> None:
    settings = Settings(num_steps=1, loss_type=loss_type, beta=0.1)  # ipo: (1 / (2 * 0.1)) ** 2 = 25
    pairs = [best_first(row, penalty=0.0) for row in rows]
    first = oracle.train(steps_of(pairs, settings), folders[0], folders[0], settings)[0]
    assert first["loss"] == pytest.approx(value, rel=1e-6)
    assert first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.0


def test_the_oracle_sums_the_log_softmax_of_the_completion_tokens(rows: list[FixedPrompt], folders: Folders) -> None:
    model, prompt, completion = oracle.load_model(folders[0]), rows[0].token_ids, rows[0].completions[0].token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double().numpy()
        logp = oracle.completion_logp(model, prompt, completion).item()
    expected = 0.0
    for offset, token in enumerate(completion):
        before = logits[len(prompt) + offset - 1]
        expected += before[token] - before.max() - math.log(np.exp(before - before.max()).sum())
    assert logp == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_online_trl_equals_the_oracle(
    loss_type: str, penalty: float, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type=loss_type, missing_eos_penalty=penalty)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    assert_parity(oracle_online(rows, folders, settings), theirs, steps=settings.num_steps)


def test_online_trl_with_repaired_accumulation_equals_the_oracle(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(micro_batch_size=4)
    theirs = trl_online.train(rows, *folders, settings, tmp_path, trainer_class=trl_online.AveragingOnlineTrainer)
    assert_parity(oracle_online(rows, folders, settings), theirs, steps=settings.num_steps)


def test_trl_lets_matrices_decay_and_norms_not(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    settings = Settings(weight_decay=30.0)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    assert_parity(oracle_online(rows, folders, settings), theirs, steps=settings.num_steps)


def test_online_trl_sums_the_gradients_of_micro_batches(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """TRL's defect, stated: two micro-batches double the gradient. Everybody else averages."""
    whole = Settings(num_steps=1, clip_grad=0.0)
    norms = [
        trl_online.train(rows, *folders, replace(whole, micro_batch_size=size), tmp_path)[0]["grad_norm"]
        for size in (8, 4)
    ]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_offline_trl_equals_the_oracle(
    loss_type: str, micro_batch_size: int, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type=loss_type, micro_batch_size=micro_batch_size)
    theirs = trl_offline.train(rows, *folders, settings, tmp_path)
    pairs = steps_of(preference_pairs(rows), settings)
    ours = oracle.train(pairs, *folders, settings, per_token=loss_type == "ipo")
    assert_parity(ours, theirs, steps=settings.num_steps)


def test_the_penalty_and_the_clipping_are_not_idle(rows: list[FixedPrompt], folders: Folders) -> None:
    """The comparisons would prove little if the penalty moved no pair and no gradient were clipped."""
    moved = [best_first(row, penalty=0.0) != best_first(row, penalty=1.0) for row in rows]
    assert sum(moved) >= 3
    metrics = oracle_online(rows, folders, Settings())
    assert all(step["grad_norm"] > Settings().clip_grad for step in metrics)
    assert len({round(step["loss"], 4) for step in metrics}) == len(metrics)


def test_a_shifted_completion_breaks_the_comparison(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    """Self-test of the yardstick: completions that belong to the next prompt must not pass."""
    settings = Settings()
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    shifted = [replace(row, completions=rows[i - 1].completions) for i, row in enumerate(rows)]
    with pytest.raises(AssertionError, match="logps/chosen"):
        assert_parity(oracle_online(shifted, folders, settings), theirs, steps=settings.num_steps)
