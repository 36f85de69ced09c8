"""Offline DPO on a preference file: this project against TRL's live ``DPOTrainer``, step by step, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import ours, trl_offline
from tests.parity.compare import assert_parity
from tests.parity.fixed_data import FixedPrompt, Settings

Folders = tuple[Path, Path]


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_every_step_equals_trl(
    loss_type: str, micro_batch_size: int, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type=loss_type, micro_batch_size=micro_batch_size)
    recipe = ours.offline_recipe(rows, *folders, settings, tmp_path)
    mine = ours.train(recipe, tmp_path / "run")
    theirs = trl_offline.train(rows, *folders, settings, tmp_path)
    assert_parity(mine, theirs, steps=settings.num_steps)
    assert [step["num_tokens"] for step in mine] == [step["num_tokens"] for step in theirs]


def test_the_entry_point_on_a_preference_file_equals_trl(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type="ipo")
    recipe = ours.offline_recipe(rows, *folders, settings, tmp_path)
    theirs = trl_offline.train(rows, *folders, settings, tmp_path)
    assert_parity(ours.run_entry_point(recipe, tmp_path / "run"), theirs, steps=settings.num_steps)
