"""Damage to any file of the newest checkpoint, those of waiting steps among them: the one before is taken, by name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlxf.checkpointing.resume import find_resume
from rlxf.checkpointing.rows import save_rows
from rlxf.checkpointing.run_folder import RunFolder
from rlxf.checkpointing.store import BEST, BEST_REASON, LATEST
from rlxf.checkpointing.waiting import save_waiting
from rlxf.core.errors import CheckpointError
from rlxf.loop.collected import Collected
from rlxf.loop.run import State
from rlxf.sync.plan import TensorSpec, plan_buckets
from rlxf.sync.saved import save_buckets
from tests.damage import DAMAGES
from tests.data_world import make_rollouts, prompt_batch
from tests.unit.small_run import SmallActor, small_config

PLAN = plan_buckets([TensorSpec(name, (4,), "float32") for name in ("first", "second")], 16)
EXPECTED = {
    *("driver.json", "logits.pt", "manifest.json", "rows/metrics.jsonl"),
    *("pushed/bucket_00000.safetensors", "pushed/bucket_00001.safetensors"),
    *("waiting/0000002.json", "waiting/0000002.safetensors", "waiting/0000003.json"),
}


def also(checkpoint: Path, state: State) -> None:
    """A step that waits, one that is sampled again, the weights for it, and a row that was not written."""
    sampled, cut = (Collected(step=state.step + i, sampled_at=state.step + i - 1, version=state.step) for i in (0, 1))
    sampled.rollouts = make_rollouts(prompt_batch([[1, 2], [3]]), [[[4], [5, 6]], [[7], [8]]])
    save_waiting(checkpoint, [sampled, cut])
    save_buckets(checkpoint, PLAN, lambda index: torch.zeros(PLAN[index].num_bytes, dtype=torch.uint8))
    save_rows(checkpoint, {"metrics.jsonl": b'{"step": 2}\n'})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = small_config(rollout__lookahead=1)
    folder = RunFolder(config, tmp_path, SmallActor(config, []), also=also)
    for step in (1, 2):
        folder.save_checkpoint(State(step=step, policy_version=step, metrics={"eval/reward": 0.5}))
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_checkpoint_before_is_taken_with_a_warning(
    run_dir: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    caplog.set_level(logging.WARNING)
    root, config = run_dir / "checkpoints", small_config(rollout__lookahead=1)
    newest = root / "iter_0000002"
    names = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert names == EXPECTED
    shutil.copytree(newest, run_dir / "whole")
    for name in sorted(names):
        damage(newest / name)
        caplog.clear()
        resume = find_resume(config, run_dir)
        assert resume is not None
        assert resume.state.step == 1
        assert f"damaged checkpoint: {newest}: " in caplog.text
        assert name in caplog.text
        shutil.rmtree(newest)
        shutil.copytree(run_dir / "whole", newest)
    resume = find_resume(config, run_dir)
    assert resume is not None
    assert resume.state.step == 2
    assert [step.step for step in resume.waiting] == [2, 3]
    assert resume.reported.unwritten == {"metrics.jsonl": b'{"step": 2}\n'}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [LATEST, BEST, BEST_REASON])
def test_pointers_are_for_people_and_may_be_damaged(run_dir: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run_dir / "checkpoints" / name)
    resume = find_resume(small_config(rollout__lookahead=1), run_dir)
    assert resume is not None
    assert resume.state.step == 2


def test_a_pointer_to_a_checkpoint_that_is_not_there_is_told(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "iter_0000002")
    resume = find_resume(small_config(rollout__lookahead=1), run_dir)
    assert resume is not None
    assert resume.state.step == 1
    assert f"iter_0000002: is missing, though {LATEST} names it" in caplog.text
    shutil.rmtree(run_dir / "checkpoints" / "iter_0000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is complete"):
        find_resume(small_config(rollout__lookahead=1), run_dir)
