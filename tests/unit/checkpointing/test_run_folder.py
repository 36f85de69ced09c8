"""Checkpoints and other files: complete, or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlxf.checkpointing import run_folder
from rlxf.checkpointing.fingerprint import fingerprint
from rlxf.checkpointing.lock import owned_checkpoints
from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.run_folder import RunFolder, save_config
from rlxf.checkpointing.store import list_checkpoints, newest_good
from rlxf.config.curve import CURVE
from rlxf.core.disk import PATIENCE_S
from rlxf.core.errors import CheckpointError, SaveError
from rlxf.loop.run import State
from tests.unit.small_run import SmallActor, small_config


def folder(run_dir: Path, **changes: object) -> RunFolder:
    config = small_config(**changes)
    return RunFolder(config, run_dir, SmallActor(config, []), sleep=lambda seconds: None)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_holds_the_actor_and_the_drivers_state(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    state = State(step=20, policy_version=18, empty_steps=1, num_tokens=500, metrics={"loss": 0.5, "kl": float("nan")})
    config = small_config(actor_rollout__data_path=str(data))
    told: list[Path] = []
    describe = lambda state: {"prompt_ids": [3, 1]}  # noqa: E731
    made = RunFolder(config, tmp_path, SmallActor(config, []), describe=describe, saved=told.append)
    made.save_checkpoint(state)
    assert told == [tmp_path / "checkpoints" / "iter_0000020"]
    assert find_problems(told[0]) == []
    assert torch.load(told[0] / "logits.pt", weights_only=True).shape == (6, 6)
    driver = json.loads((told[0] / "driver.json").read_text(), parse_constant=pytest.fail)
    expected = {
        "format": 1, "curve": CURVE, "step": 20, "policy_version": 18, "empty_steps": 1, "num_tokens": 500,
        "metrics": {"loss": 0.5, "kl": None}, "prompt_ids": [3, 1],
        "run_folder": str(tmp_path),
    }  # fmt: skip
    assert {name: driver[name] for name in expected} == expected
    assert driver["config"]["training"]["seed"] == 7
    assert driver["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert names(tmp_path) == ["iter_0000020", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "20\n"


def test_checkpoints_go_where_the_recipe_says(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    made = folder(tmp_path / "run", actor_rollout__save=str(elsewhere))
    made.save_checkpoint(State(step=1))
    made.save_hf(1)
    assert sorted(path.name for path in elsewhere.glob("*_*1")) == ["hf_0000001", "iter_0000001"]


class FullDisk(SmallActor):
    """Writes half of its file."""

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        (folder / "logits.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    config = small_config()
    RunFolder(config, tmp_path, SmallActor(config, [])).save_checkpoint(State(step=1))
    pauses: list[float] = []
    with pytest.raises(SaveError, match=r"could not be written: .*No space left on device \(ENOSPC\).*hydra\.run\.dir"):
        RunFolder(config, tmp_path, FullDisk(config, []), sleep=pauses.append).save_checkpoint(State(step=2))
    assert PATIENCE_S <= sum(pauses) < PATIENCE_S + 4
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert newest_good(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "iter_0000001"


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folder(tmp_path, training__keep_latest=3)
    made.save_checkpoint(State(step=1))
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "iter_0000001").iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, size))  # it fits, but not with a margin
    with pytest.raises(CheckpointError) as caught:
        made.save_checkpoint(State(step=2))
    for part in (f"about {int(1.1 * size):,} bytes", f"{size:,} are free", "training.keep_latest = 3", "hydra.run.dir"):
        assert part in str(caught.value)
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_the_first_checkpoint_needs_four_times_the_models_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3999))
    with pytest.raises(CheckpointError, match="about 4,000 bytes, but 3,999 are free"):
        folder(tmp_path, actor_rollout__load=str(tmp_path / "model"))


def test_in_the_background_a_checkpoint_has_its_name_when_it_is_written(tmp_path: Path) -> None:
    config = small_config(training__async_save=True)
    actor, told = SmallActor(config, []), list[Path]()
    made = RunFolder(config, tmp_path, actor, saved=told.append)
    made.save_checkpoint(State(step=1))
    with torch.no_grad():
        actor.logits += 1.0  # training goes on
    made.poll()
    assert told == []
    assert list_checkpoints(tmp_path / "checkpoints") == []
    made.wait()
    (checkpoint,) = told
    assert find_problems(checkpoint) == []
    assert float(torch.load(checkpoint / "logits.pt", weights_only=True).abs().sum()) == 0.0  # the state of step 1
    made.poll()
    assert told == [checkpoint]


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_hangs_ends_the_wait_and_not_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    made = folder(tmp_path, training__async_save=background, training__stage_timeout_s=1)
    made.save_checkpoint(State(step=1))
    made.wait()
    again = threading.Event()
    monkeypatch.setattr(run_folder, "publish", lambda *_: again.wait(60))
    if background:
        made.save_checkpoint(State(step=2))
    save = made.wait if background else lambda: made.save_checkpoint(State(step=2))
    with pytest.raises(CheckpointError, match=r"iter_0000002: was not written within 1 s.*training\.stage_timeout_s"):
        save()
    assert newest_good(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "iter_0000001"
    (publisher,) = (thread for thread in threading.enumerate() if thread.name == "publish")
    assert publisher.daemon  # the process can end
    again.set()
    publisher.join(60)
    assert not publisher.is_alive()


@pytest.mark.parametrize("background", [False, True])
def test_no_thread_is_left_when_a_checkpoint_is_there(tmp_path: Path, background: bool) -> None:
    before = threading.active_count()
    for number in range(3):  # runs of one process
        made = folder(tmp_path / str(number), training__async_save=background)
        made.save_checkpoint(State(step=1))
        made.wait()
    for thread in threading.enumerate():
        if thread.name == "publish":
            thread.join(60)
    assert threading.active_count() == before


def test_two_checkpoints_are_never_written_at_once(tmp_path: Path) -> None:
    config, told = small_config(training__async_save=True), list[Path]()
    made = RunFolder(config, tmp_path, SmallActor(config, []), saved=told.append)
    made.save_checkpoint(State(step=1))
    made.save_checkpoint(State(step=2))
    assert [path.name for path in told] == ["iter_0000001"]
    made.wait()
    assert [path.name for path in told] == ["iter_0000001", "iter_0000002"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    made = folder(tmp_path, training__keep_latest=2, training__keep_best=1, training__keep_best_metric="reward")
    for step, reward in enumerate((0.1, 0.9, 0.3, 0.2, 0.4), start=1):
        made.save_checkpoint(State(step=step, metrics={"reward": reward}))
    kept = [name for name in names(tmp_path) if name.startswith("iter")]
    assert kept == ["iter_0000002", "iter_0000004", "iter_0000005"]


def pointer(run_dir: Path) -> tuple[str, dict[str, Any]]:
    root = run_dir / "checkpoints"
    reason = json.loads((root / "best_checkpointed_iteration.json").read_text())
    return (root / "best_checkpointed_iteration.txt").read_text(), reason


@pytest.mark.parametrize(
    ("stage", "changes", "metric", "values", "expected"),
    [
        ("ray_online_dpo", {}, "eval/reward", (0.1, 0.9, 0.9, 0.2), (3, "max", 0.9)),
        ("dpo", {}, "eval/loss", (0.4, 0.1, 0.3, 0.2), (2, "min", 0.1)),
        ("dpo", {"keep_best_metric": "loss"}, "loss", (0.1, 0.9, 0.3, 0.2), (1, "min", 0.1)),
        ("dpo", {"keep_best_metric": "kl", "keep_best_mode": "min"}, "kl", (3.0, 2.0, 4.0, 5.0), (2, "min", 2.0)),
        ("dpo", {"keep_best_metric": "kl"}, "kl", (3.0, float("nan"), 4.0, 2.0), (3, "max", 4.0)),
    ],
)
def test_a_pointer_names_the_best_checkpoint_that_is_there(
    tmp_path: Path, stage: str, changes: dict[str, Any], metric: str, values: tuple[float, ...], expected: Any
) -> None:
    settings = {f"training__{name}": value for name, value in {"stage": stage, **changes}.items()}
    made = folder(tmp_path, **settings)
    for step, value in enumerate(values, start=1):
        made.save_checkpoint(State(step=step, metrics={metric: value}))
    step, mode, value = expected
    assert pointer(tmp_path) == (f"{step}\n", {"step": step, "metric": metric, "mode": mode, "value": value})


@pytest.mark.parametrize(
    ("errors", "said"),
    [((0.3, 0.4), True), ((0.1, 0.2), False), ((None, 0.4), False), ((float("nan"), 0.4), False)],
)
def test_a_best_checkpoint_that_may_be_so_by_chance_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, errors: tuple[float | None, float], said: bool
) -> None:
    """The rewards differ by 0.5, the root of 0.3^2 + 0.4^2."""
    caplog.set_level(logging.INFO)
    made = folder(tmp_path, training__eval_interval=1)
    for step, (reward, error) in enumerate(zip((1.0, 5.0, 4.5, 2.0), (0.1, *errors, 0.1), strict=True), start=1):
        metrics = {"eval/reward": reward, "eval/reward_se": error}
        state = State(step=step, metrics={name: value for name, value in metrics.items() if value is not None})
        made.save_checkpoint(state)
    told = [record.getMessage() for record in caplog.records if "standard errors" in record.getMessage()]
    expected = (
        "eval/reward: the best checkpoint, iter_0000002 (5.000 ± 0.30), and the next, iter_0000003 (4.500 ± 0.40), "
        "differ by less than their standard errors"
    )
    assert told == ([expected] if said else [])


def test_the_pointer_moves_on_when_the_best_checkpoint_is_deleted(tmp_path: Path) -> None:
    made = folder(tmp_path, training__keep_latest=2)
    for step, reward in enumerate((0.9, 0.1, 0.3, 0.2), start=1):
        made.save_checkpoint(State(step=step, metrics={"eval/reward": reward}))
        best = int(pointer(tmp_path)[0])
        assert (tmp_path / "checkpoints" / f"iter_{best:07d}").is_dir()
    assert best == 3


def _hold(save: str, ready: Any, leave: Any) -> None:
    with owned_checkpoints(Path(save), Path("run")):
        ready.set()
        leave.wait(60)


def test_two_runs_never_write_into_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, leave))
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(CheckpointError, match=rf"process {other.pid} on .*actor_rollout\.save"),
        owned_checkpoints(tmp_path, Path("run")),
    ):
        pass
    os.kill(other.pid or 0, 9)  # however it ends, the folder is free
    other.join()
    with owned_checkpoints(tmp_path, Path("run")):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was saved, and the folder was there before


def test_a_run_that_did_not_start_removes_only_the_folder_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, stays in (("mine", True), ("new", False)):
        with owned_checkpoints(tmp_path / name, tmp_path / "run"):
            assert (tmp_path / name).is_dir()
        assert (tmp_path / name).exists() == stays
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_merged_recipe_is_readable_yaml(tmp_path: Path) -> None:
    config = small_config()
    save_config(config, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.dump()


def test_a_fingerprint_changes_with_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"a" * 2_000_000)
    before = fingerprint([str(path)])
    path.write_bytes(b"a" * 1_999_999 + b"b")
    assert fingerprint([str(path)])["num_bytes"] == before["num_bytes"]
    assert fingerprint([str(path)])["sha256"] != before["sha256"]
