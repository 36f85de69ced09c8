"""Half precision: the scaled loss trains as the unscaled one, and an overflow costs a step, not the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import TrainingError
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("fp16") / "model")


def actor(folder: Path, **settings: Any) -> MegatronActor:
    return build_actor(run_config(folder, ppo_mini_batch_size=4, **settings), get_platform("cpu"), Process())


def weights(of: MegatronActor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.model.export([name for name, _ in of.model.exported_shapes()])}


def test_a_step_is_that_of_fp32_to_half_precision(folder: Path) -> None:
    batch = referenced(random_pairs(4))
    full, half = actor(folder), actor(folder, fp16=True, initial_loss_scale=256.0)
    expected, found = full.update(batch, 0), half.update(batch, 0)
    assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    assert (found["loss_scale"], found["skipped_steps"]) == (256.0, 0.0)
    assert "loss_scale" not in expected
    assert all(value.dtype == torch.float16 for value in weights(half).values())


def test_the_size_of_the_scale_changes_nothing(folder: Path) -> None:
    batch = referenced(random_pairs(4))
    norms = [actor(folder, fp16=True, loss_scale=scale).update(batch, 0)["grad_norm"] for scale in (64.0, 512.0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_an_overflow_is_passed_over_and_the_scale_falls_until_training_goes_on(folder: Path) -> None:
    trained = actor(folder, fp16=True, initial_loss_scale=2.0**30, hysteresis=1)
    before, batch = weights(trained), referenced(random_pairs(4))
    first = trained.update(batch, 0)
    assert (first["skipped_steps"], first["loss_scale"]) == (1.0, 2.0**29)
    assert math.isnan(first["grad_norm"])
    assert math.isfinite(first["loss"])
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    rows = [trained.update(batch, step) for step in range(1, 30)]
    assert rows[-1]["skipped_steps"] == 0.0
    assert rows[-1]["loss_scale"] < 2.0**29
    assert rows[-1]["loss"] < first["loss"]


@pytest.mark.parametrize(
    "settings", [{"loss_scale": 2.0**30}, {"initial_loss_scale": 2.0**30, "min_loss_scale": 2.0**30}]
)
def test_an_overflow_that_no_smaller_scale_follows_ends_the_run(folder: Path, settings: dict[str, float]) -> None:
    trained = actor(folder, fp16=True, **settings)
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"step 1: gradients overflow fp16 at a loss scale of 1\.07374e"):
        trained.update(referenced(random_pairs(4)), 0)
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())


def test_the_scale_grows_after_its_window(folder: Path) -> None:
    trained = actor(folder, fp16=True, initial_loss_scale=64.0, loss_scale_window=2)
    scales = [trained.update(referenced(random_pairs(4)), step)["loss_scale"] for step in range(4)]
    assert scales == [64.0, 128.0, 128.0, 256.0]


def test_training_goes_on_bit_for_bit_with_the_scale_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    batches = [referenced(random_pairs(4, seed=seed), seed) for seed in range(4)]
    settings = {"fp16": True, "initial_loss_scale": 64.0, "loss_scale_window": 3}
    whole = actor(folder, **settings)
    for step in range(2):
        whole.update(batches[step], step)
    whole.save_checkpoint(tmp_path)
    expected = [whole.update(batches[step], step) for step in (2, 3)]
    resumed = actor(folder, **settings)
    resumed.load_checkpoint(tmp_path)
    assert [resumed.update(batches[step], step) for step in (2, 3)] == expected
    assert expected[-1]["loss_scale"] == 128.0
