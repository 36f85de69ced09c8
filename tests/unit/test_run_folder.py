"""Checkpoints and other files: complete, or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from rlxf.run import State
from rlxf.run_folder import RunFolder, fingerprint, replace_folder, save_config, write_text
from tests.unit.small_run import SmallActor, small_config


def folder(run_dir: Path, **changes: object) -> RunFolder:
    config = small_config(**changes)
    return RunFolder(config, run_dir, SmallActor(config, []))


def test_a_checkpoint_holds_the_actor_and_the_drivers_state(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    state = State(step=20, policy_version=18, empty_steps=1, num_tokens=500)
    made = folder(tmp_path, actor_rollout__data_path=str(data)).save_checkpoint(state)
    assert made == tmp_path / "checkpoints" / "iter_0000020"
    assert torch.load(made / "logits.pt", weights_only=True).shape == (6, 6)
    driver = json.loads((made / "driver.json").read_text())
    assert {name: driver[name] for name in ("step", "policy_version", "empty_steps", "num_tokens", "saved_step")} == {
        "step": 20,
        "policy_version": 18,
        "empty_steps": 1,
        "num_tokens": 500,
        "saved_step": 20,
    }
    assert driver["config"]["training"]["seed"] == 7
    assert driver["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "20\n"


def test_checkpoints_go_where_the_recipe_says(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    made = folder(tmp_path / "run", actor_rollout__save=str(elsewhere)).save_checkpoint(State(step=1))
    assert made.parent == elsewhere


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    replace_folder(target, lambda path: write_text(path / "file", "old"))

    def crash(path: Path) -> None:
        write_text(path / "file", "new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, crash)
    assert (target / "file").read_text() == "old"
    replace_folder(target, lambda path: write_text(path / "file", "newer"))
    assert (target / "file").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]


def test_the_merged_recipe_is_readable_yaml(tmp_path: Path) -> None:
    config = small_config()
    save_config(config, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.dump()


def test_a_fingerprint_changes_with_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"a" * 2_000_000)
    before = fingerprint(path)
    path.write_bytes(b"a" * 1_999_999 + b"b")
    assert fingerprint(path)["num_bytes"] == before["num_bytes"]
    assert fingerprint(path)["sha256"] != before["sha256"]
