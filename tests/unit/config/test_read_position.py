"""Where a reward model's score is read: by the recipe, by the model's folder, and what is said where neither does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from rlxf.core.read_position import read_position, stored_position
from tests.tiny_models import save_causal_lm, save_reward_model
from tests.unit.config.recipes import recipe


def marked(folder: Path, value: Any) -> Path:
    """A folder whose ``config.json`` names a position; None: as models from elsewhere."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({} if value is None else {"rlxf_read_at": value}))
    return folder


@pytest.mark.parametrize(
    ("stored", "key", "expected"),
    [
        (None, "auto", "last_token"),
        (None, "end_of_turn", "end_of_turn"),
        ("end_of_turn", "auto", "end_of_turn"),
        ("last_token", "auto", "last_token"),
        ("end_of_turn", "last_token", "last_token"),
    ],
)
def test_the_recipe_decides_then_the_folder(stored: str | None, key: Any, expected: str, tmp_path: Path) -> None:
    folder = marked(tmp_path / "rm", stored)
    assert read_position(key, str(folder)) == expected


def test_a_position_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = marked(tmp_path / "rm", "first_token")
    with pytest.raises(ConfigError, match=r"config\.json: rlxf_read_at = 'first_token'; expected end_of_turn or last_"):
        read_position("auto", str(folder))
    assert read_position("last_token", str(folder)) == "last_token"


def test_a_checkpoint_of_a_run_says_it_itself(tmp_path: Path) -> None:
    """Its config.json is that of the language model that the run began with."""
    start = marked(tmp_path / "start", None)
    checkpoint = tmp_path / "ckpt" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("3\n")
    driver = {"config": {"actor_rollout": {"load": str(start)}}}
    (checkpoint / "driver.json").write_text(json.dumps(driver))
    assert stored_position(checkpoint) is None  # of revision de81d37
    (checkpoint / "driver.json").write_text(json.dumps(driver | {"rlxf_read_at": "end_of_turn"}))
    assert stored_position(checkpoint) == stored_position(tmp_path / "ckpt") == "end_of_turn"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_causal_lm(folder / "sft", vocab_size=260)
    save_reward_model(folder / "rm", vocab_size=260)
    return folder


def warnings_of(models: Path, caplog: pytest.LogCaptureFixture, **reward: Any) -> list[str]:
    raw = recipe(
        actor_rollout={"load": str(models / "sft")}, reward={"load": str(models / "rm"), **reward}, runtime="local",
        resource_pool={"actor_rollout": 1, "colocate": ["train", "infer"]},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        load_config(raw)
    return [record.getMessage() for record in caplog.records]


def test_a_folder_that_says_nothing_is_named_with_the_position_and_the_key(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (said,) = warnings_of(models, caplog)
    assert str(models / "rm") in said
    assert "the score is read at the last token of the text" in said
    assert "reward.read_at=last_token" in said
    assert "reward.read_at=end_of_turn" in said


@pytest.mark.parametrize("position", ["end_of_turn", "last_token"])
def test_nothing_is_said_where_the_recipe_decides(
    models: Path, position: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(models, caplog, read_at=position) == []


def test_nothing_is_said_of_a_reward_function(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "reward.py").touch()
    assert warnings_of(models, caplog, load=None, model=None, function=str(tmp_path / "reward.py")) == []
