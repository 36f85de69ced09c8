"""Training state on disk: exact in one layout, resharded to any other, and written while training goes on."""

from __future__ import annotations

import errno
import random
import threading
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import CheckpointError, DiskError, SaveError
from rlxf.core.types import Metrics
from rlxf.models.megatron import checkpoint as checkpoint_module
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from tests.ranks import on_ranks
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm

NUM_PAIRS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A vocabulary that two ranks share evenly.
    return save_causal_lm(tmp_path_factory.mktemp("actor") / "model", "llama", tied=True, vocab_size=260)


def actor(folder: Path, process: Process | None = None, **settings: Any) -> MegatronActor:
    config = run_config(folder, **{"ppo_mini_batch_size": NUM_PAIRS, "weight_decay": 0.1, **settings})
    return build_actor(config, get_platform("cpu"), process or Process())


def update(of: MegatronActor, *steps: int) -> list[Metrics]:
    return [of.update(referenced(random_pairs(NUM_PAIRS, seed=step), step), step) for step in steps]


def weights(of: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.model.export([name for name, _ in of.model.exported_shapes()])}


def draw() -> tuple[Any, ...]:
    """The next number of every random state that a checkpoint holds."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_go_on_where_they_were(folder: Path, tmp_path: Path) -> None:
    saved = actor(folder)
    random.seed(4)
    np.random.seed(5)
    torch.manual_seed(6)
    draw()
    saved.save_checkpoint(tmp_path)
    expected = [draw() for _ in range(3)]
    resumed = actor(folder)
    resumed.load_checkpoint(tmp_path)
    assert [draw() for _ in range(3)] == expected


def test_a_run_without_an_update_so_far_is_saved_too(folder: Path, tmp_path: Path) -> None:
    """Its first steps had no pair."""
    saved = actor(folder)
    saved.save_checkpoint(tmp_path)
    resumed = actor(folder)
    resumed.load_checkpoint(tmp_path)
    assert update(resumed, 0, 1) == update(saved, 0, 1) == update(actor(folder), 0, 1)


def test_the_optimizers_settings_are_the_recipes_and_not_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    saved = actor(folder, adam_beta1=0.9, adam_eps=1e-8)
    update(saved, 0)
    saved.save_checkpoint(tmp_path)
    resumed = actor(folder, adam_beta1=0.5, adam_eps=1e-3)
    resumed.load_checkpoint(tmp_path)
    for group in resumed.trainable.optimizer.param_groups:
        assert (group["betas"][0], group["eps"], group["step"]) == (0.5, 1e-3, 1)


def test_training_goes_on_while_a_checkpoint_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), checkpoint_module.Write._write
    monkeypatch.setattr(checkpoint_module.Write, "_write", lambda self: go_on.wait(60) and write(self))
    whole = actor(folder)
    update(whole, 0, 1)
    whole.save_checkpoint(tmp_path, background=True)
    assert not whole.checkpoint_written(wait=False)
    expected = update(whole, 2, 3)  # changes every tensor that is still to be written
    assert not list(tmp_path.glob("*.distcp"))
    go_on.set()
    assert whole.checkpoint_written(wait=True)
    assert whole.checkpoint_written(wait=False)
    resumed = actor(folder)
    resumed.load_checkpoint(tmp_path)
    assert update(resumed, 2, 3) == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_copy_is_made_of_what_training_changes_and_of_nothing_else(folder: Path) -> None:
    trained = actor(folder)
    update(trained, 0)
    live = checkpoint_module._live_storages(trained.trainable)
    parameter = next(trained.model.last.parameters()).detach()
    own = torch.ones(3)
    bucket = ("path", "key", ([], [("view of a parameter", parameter), ("own", own)]))
    (_, copied), (_, kept) = checkpoint_module._snapshot(bucket, live)[2][1]
    before = copied.clone()
    update(trained, 1)
    assert torch.equal(copied, before)
    assert not torch.equal(parameter, before)
    assert kept.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_be_written_is_an_error_with_its_reason(
    folder: Path, tmp_path: Path, background: bool
) -> None:
    saved = actor(folder)
    (tmp_path / "__0_1.distcp").mkdir()
    if background:
        saved.save_checkpoint(tmp_path, background=True)
    write = saved.checkpoint_written if background else lambda wait: saved.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not be written: rank 0: .*Is a directory.*__0_1\.distcp"):
        write(wait=True)


def _child(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any], job: dict[str, Any]) -> None:
    """Load, train, save (in the background, a step further), train on; rank 0 keeps what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    mine = actor(folder, Process(rank=rank, world_size=world_size, master_port=port), **settings)
    if "load" in job:
        mine.load_checkpoint(job["load"])
    update(mine, *job.get("before", ()))
    torch.manual_seed(100 + rank)
    if "save" in job:
        mine.save_checkpoint(job["save"], background=True)
    drawn = float(torch.rand(()))
    metrics = update(mine, *job["after"])
    mine.checkpoint_written(wait=True)
    if "save" in job:  # every rank takes its own random state over again
        mine.load_checkpoint(job["save"])
        assert float(torch.rand(())) == drawn
        assert update(mine, *job["after"]) == metrics
    result = {"metrics": metrics, "weights": weights(mine)}
    if rank == 0:
        torch.save(result, job["out"])
    torch.distributed.barrier()


def on_two(folder: Path, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
    on_ranks(_child, 2, folder, settings, job)
    result: dict[str, Any] = torch.load(job["out"], weights_only=True)
    return result


LAYOUTS = [
    pytest.param({"tensor_model_parallel_size": 2}, id="tp2"),
    pytest.param({"pipeline_model_parallel_size": 2}, id="pp2"),
    pytest.param({"ppo_mini_batch_size": NUM_PAIRS // 2}, id="dp2", marks=pytest.mark.slow),
    pytest.param({"context_parallel_size": 2}, id="cp2", marks=pytest.mark.slow),
    pytest.param({"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="tp2-sp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_save_and_one_goes_on_and_the_other_way_round(
    folder: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    two = on_two(folder, layout, before=(0, 1), save=tmp_path / "two", after=(2, 3), out=tmp_path / "two.pt")
    one = actor(folder)
    one.load_checkpoint(tmp_path / "two")
    found = update(one, 2, 3)
    same(found, weights(one), two)
    one.save_checkpoint(tmp_path / "one")
    again = on_two(folder, layout, load=tmp_path / "one", after=(4,), out=tmp_path / "again.pt")
    same(update(one, 4), weights(one), again)


def same(metrics: list[Metrics], of: dict[str, torch.Tensor], other: dict[str, Any]) -> None:
    for mine, theirs in zip(metrics, other["metrics"], strict=True):
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for name, value in of.items():
        torch.testing.assert_close(other["weights"][name], value, atol=2e-5, rtol=0)


def _full(rank: int, world_size: int, port: int, folder: Path, root: Path) -> None:
    """Files that rank 0 alone writes fail, one after the other; then all of it is written."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    mine = actor(folder, Process(rank=rank, world_size=world_size, master_port=port), tensor_model_parallel_size=2)
    failing = [
        ("megatron.core.dist_checkpointing.strategies.common.TorchCommonSaveStrategy.save_common", "common.pt"),
        ("megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.finish", ".metadata"),
        ("megatron.core.dist_checkpointing.serialization.save_config", "metadata.json"),
    ]
    for target, name in failing:
        error = OSError(errno.ENOSPC, "No space left on device", name)
        (root / name).mkdir(exist_ok=True)
        with (
            patch(target, side_effect=error if rank == 0 else None),
            pytest.raises(SaveError, match=f"rank 0: .*{name}"),
        ):
            mine.save_checkpoint(root / name)
    with patch("rlxf.models.hf_folder.write_assets", side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):
        if rank == 0:
            with pytest.raises(DiskError, match="hf: Disk quota exceeded"):
                mine.save_hf(root / "hf")
        else:
            mine.save_hf(root / "hf")
    (root / "whole").mkdir(exist_ok=True)
    mine.save_checkpoint(root / "whole")
    mine.save_hf(root / "hf")
    mine.load_checkpoint(root / "whole")
    torch.distributed.barrier()


def test_a_disk_that_is_full_on_one_rank_is_an_error_of_all_and_the_next_save_works(
    folder: Path, tmp_path: Path
) -> None:
    on_ranks(_full, 2, folder, tmp_path)
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".hf")]
