"""Online DPO on fixed completions and scores: this project against TRL's live trainer, step by step, in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity import oracle, ours, trl_online
from tests.parity.compare import NAMES, assert_parity, excess
from tests.parity.fixed_data import FixedPrompt, Settings, best_first, steps_of
from tests.parity.oracle import Metrics

Folders = tuple[Path, Path]


def train_here(rows: list[FixedPrompt], folders: Folders, settings: Settings, folder: Path) -> list[Metrics]:
    return ours.train(ours.online_recipe(rows, *folders, settings, folder), folder / "run")


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_every_step_equals_trl(
    loss_type: str, penalty: float, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type=loss_type, missing_eos_penalty=penalty)
    mine = train_here(rows, folders, settings, tmp_path)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    assert_parity(mine, theirs, steps=settings.num_steps)
    for a, b in zip(mine, theirs, strict=True):
        for name in ("objective/scores", "objective/scores_margin", "val/contain_eos_token", "learning_rate", "beta"):
            assert excess(a[name], b[name]) <= 1, name


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_every_step_of_two_micro_batches_equals_trl_up_to_its_summed_gradients(
    loss_type: str, penalty: float, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """TRL's online trainer sums the gradients of micro-batches; here they are averaged, as in its own offline trainer.

    So its gradient norm is twice ours. Without clipping AdamW is blind to that factor, and all else must agree.
    """
    settings = Settings(loss_type=loss_type, missing_eos_penalty=penalty, micro_batch_size=4, clip_grad=0.0)
    mine = train_here(rows, folders, settings, tmp_path)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    halved = [{**step, "grad_norm": step["grad_norm"] / settings.accumulation} for step in theirs]
    assert_parity(mine, halved, steps=settings.num_steps)


def test_every_step_of_two_micro_batches_with_clipping_equals_repaired_trl(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(micro_batch_size=4)
    repaired = trl_online.AveragingOnlineTrainer
    theirs = trl_online.train(rows, *folders, settings, tmp_path, trainer_class=repaired)
    assert all(step["grad_norm"] > settings.clip_grad for step in theirs)
    assert_parity(train_here(rows, folders, settings, tmp_path), theirs, steps=settings.num_steps)


def test_weight_decay_spares_the_norms_as_in_trl(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    settings = Settings(weight_decay=30.0)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    assert_parity(train_here(rows, folders, settings, tmp_path), theirs, steps=settings.num_steps)


def test_the_entry_point_on_recorded_rollouts_equals_trl(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """The same through ``python ray_gpt.py ... rollout.engine=replay runtime=local`` and its ``metrics.jsonl``."""
    settings = Settings(missing_eos_penalty=1.0)
    recipe = ours.online_recipe(rows, *folders, settings, tmp_path)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    assert_parity(ours.run_entry_point(recipe, tmp_path / "run"), theirs, steps=settings.num_steps)


def test_a_tie_is_dropped_here_and_trained_on_in_trl(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    """The one place where this project leaves TRL: equal scores say nothing, so the pair teaches nothing."""
    settings = Settings(num_steps=1)
    first, second = rows[0].completions
    tied = replace(rows[0], completions=(first, replace(second, score=first.score)))
    batch = [tied, *rows[1:8]]
    mine = train_here(batch, folders, settings, tmp_path)
    theirs = trl_online.train(batch, *folders, settings, tmp_path)
    pairs = [best_first(row, penalty=0.0) for row in batch]
    seven = replace(settings, pairs_per_step=7)
    assert_parity(mine, oracle.train(steps_of(pairs[1:], seven), *folders, seven), steps=1)
    assert_parity(theirs, oracle.train(steps_of(pairs, settings), *folders, settings), steps=1)
    assert mine[0]["pair/dropped"] == 1
    assert mine[0]["pair/kept"] == 7
    assert excess(mine[0]["loss"], theirs[0]["loss"]) > 100


def test_drift_counts_completion_tokens_only(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    """Against the oracle: TRL's ``objective/kl`` and ``objective/entropy`` add up padding, too."""
    settings = Settings()
    pairs = [best_first(row, penalty=0.0) for row in rows]
    expected = oracle.train(steps_of(pairs, settings), *folders, settings)
    for a, b in zip(train_here(rows, folders, settings, tmp_path), expected, strict=True):
        assert a["objective/kl"] == pytest.approx(b["objective/kl"], abs=1e-5)
        assert a["objective/entropy"] == pytest.approx(b["objective/entropy"], rel=1e-5)


def test_the_comparison_sees_an_update_that_was_not_made(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """Self-test: six steps move every metric beyond the tolerance, so agreement is about the updates, too."""
    settings = Settings()
    frozen = train_here(rows, folders, replace(settings, lr=0.0), tmp_path)
    theirs = trl_online.train(rows, *folders, settings, tmp_path)
    last = {name: excess(frozen[-1][name], theirs[-1][name]) for name in NAMES if name != "rewards/accuracies"}
    assert min(last.values()) > 3, last
