"""A reference that follows the policy: the mixture of TR-DPO, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.assembly.roles import build_actor, build_reference
from rlxf.config.roles import ReferenceConfig
from rlxf.config.schema import RunConfig
from rlxf.core.errors import CheckpointError
from rlxf.models.hf_folder import save_hf_folder
from rlxf.platform import Process, get_platform
from rlxf.reference.frozen import FrozenReference
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.refresh import ReferenceUpdater, no_refresh
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm


def weights(of: Any) -> dict[str, Tensor]:
    names = [name for name, _ in of.model.exported_shapes()]
    return {name: tensor.clone() for name, tensor in of.model.export(names)}


def equal(one: Any, other: Any) -> bool:
    """Whether two rooms hold the same weights, bit for bit."""
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def settings(alpha: float, interval: int = 2) -> ReferenceConfig:
    return ReferenceConfig(model="tiny", ref_update_interval=interval, ref_mixup_alpha=alpha)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_reference_becomes_the_mixture_when_it_is_due(tmp_path: Path, kind: str) -> None:
    folder = save_causal_lm(tmp_path / "model", kind, tied=kind == "llama")
    config = run_config(folder, ppo_mini_batch_size=4, lr=0.1)
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (build_actor, build_reference))
    refresh = ReferenceUpdater(actor, reference, settings(0.6))
    start = weights(reference)
    for step in range(2):
        actor.update(referenced(random_pairs(4, seed=step)), step)
        refresh(step + 1)
        if step == 0:  # not due yet
            assert all(torch.equal(value, start[name]) for name, value in weights(reference).items())
    policy, moved = weights(actor), weights(reference)
    for name, value in moved.items():
        torch.testing.assert_close(value, 0.6 * policy[name] + 0.4 * start[name], atol=1e-6, rtol=1e-6)
        assert not torch.equal(policy[name], start[name])


def test_alpha_one_takes_the_policy_over_bit_for_bit_and_gives_a_margin_of_zero(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model")
    config = run_config(folder, ppo_mini_batch_size=4, lr=0.1)
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (build_actor, build_reference))
    pairs = random_pairs(4)
    actor.update(referenced(pairs), 0)
    ReferenceUpdater(actor, reference, settings(1.0, interval=1))(1)
    assert equal(reference, actor)


def test_a_saved_reference_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", tied=True)
    config = run_config(folder, ppo_mini_batch_size=4, lr=0.1)
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (build_actor, build_reference))
    actor.update(referenced(random_pairs(4)), 0)
    refresh = ReferenceUpdater(actor, reference, settings(0.5, interval=1))
    refresh(1)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    refresh.save(checkpoint)
    other = build_reference(config, get_platform("cpu"), Process())
    ReferenceUpdater(actor, other, settings(0.5)).load(checkpoint)
    assert equal(other, reference)
    pairs = random_pairs(3, seed=7)
    assert torch.equal(other.logps(pairs).chosen, reference.logps(pairs).chosen)


class Fixed:
    """A policy that stays as it is."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        specs = [
            TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in weights.items()
        ]
        self._weights = weights
        self._plan = plan_buckets(specs, 2**16)

    def sync_plan(self) -> tuple[Bucket, ...]:
        return self._plan

    def export_copy(self, index: int) -> Tensor:
        bucket = self._plan[index]
        payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for name, view in bucket.views(payload):
            view.copy_(self._weights[name])
        return payload


def moved(weights: dict[str, Tensor], policy: dict[str, Tensor], alpha: float, moves: int) -> dict[str, Tensor]:
    """What ``moves`` moves make of fp32 weights, in float64."""
    kept = (1 - alpha) ** moves
    return {name: kept * weights[name].double() + (1 - kept) * policy[name].double() for name in weights}


def bf16_reference(folder: Path) -> FrozenReference:
    return build_reference(with_moves(run_config(folder, bf16=True)), get_platform("cpu"), Process())


def with_moves(config: RunConfig, **ref: Any) -> RunConfig:
    return config.model_copy(update={"ref": config.ref.model_copy(update={"ref_update_interval": 1, **ref})})


@pytest.mark.parametrize("tied", [True, False])
def test_small_moves_add_up_in_bf16(tmp_path: Path, tied: bool) -> None:
    """Each is far below the distance of neighbouring bf16 numbers."""
    alpha, moves = 1e-3, 200
    folder = save_causal_lm(tmp_path / "model", tied=tied)
    reference, other = bf16_reference(folder), bf16_reference(save_causal_lm(tmp_path / "other", tied=tied, seed=9))
    start, policy = weights(reference), weights(other)
    refresh = ReferenceUpdater(Fixed(policy), reference, settings(alpha, interval=1))
    for version in range(1, moves + 1):
        refresh(version)
    found = weights(reference)
    for name, expected in moved(start, policy, alpha, moves).items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-8, atol=1e-6)  # rounded once


def test_a_checkpoint_goes_on_where_small_moves_stopped(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", tied=True)
    policy = weights(bf16_reference(save_causal_lm(tmp_path / "other", tied=True, seed=9)))
    whole, first = bf16_reference(folder), bf16_reference(folder)
    for version in range(1, 41):
        ReferenceUpdater(Fixed(policy), whole, settings(1e-3, interval=1))(version)
    half = ReferenceUpdater(Fixed(policy), first, settings(1e-3, interval=1))
    for version in range(1, 21):
        half(version)
    (tmp_path / "iter_0000020").mkdir()
    half.save(tmp_path / "iter_0000020")
    second = bf16_reference(folder)
    rest = ReferenceUpdater(Fixed(policy), second, settings(1e-3, interval=1))
    rest.load(tmp_path / "iter_0000020")
    assert equal(second, first)
    for version in range(21, 41):
        rest(version)
    assert equal(second, whole)


def test_a_checkpoint_of_bf16_weights_only_is_where_the_moves_go_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_causal_lm(tmp_path / "model")
    stored = bf16_reference(save_causal_lm(tmp_path / "stored", seed=5))
    policy = weights(bf16_reference(save_causal_lm(tmp_path / "other", seed=9)))
    checkpoint = tmp_path / "iter_0000001"
    save_hf_folder(
        checkpoint / "reference", weights(stored).items(), like=folder, changes=stored.model.config_changes()
    )
    reference = bf16_reference(folder)
    refresh = ReferenceUpdater(Fixed(policy), reference, settings(1e-3, interval=1))
    refresh.load(checkpoint)
    assert "reference: an earlier version wrote the reference in bfloat16" in caplog.text
    assert equal(reference, stored)
    for version in range(1, 101):
        refresh(version)
    found = weights(reference)
    for name, expected in moved(weights(stored), policy, 1e-3, 100).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-8, atol=1e-6)


def test_a_run_whose_reference_moves_from_now_on_keeps_it_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_causal_lm(tmp_path / "model")
    reference = build_reference(with_moves(run_config(folder)), get_platform("cpu"), Process())
    start = weights(reference)
    (tmp_path / "iter_0000001").mkdir()
    ReferenceUpdater(Fixed(start), reference, settings(0.5)).load(tmp_path / "iter_0000001")
    assert "iter_0000001: the run that wrote it did not move the reference" in caplog.text
    assert all(torch.equal(value, start[name]) for name, value in weights(reference).items())


class Breaks(Fixed):
    """Its third bucket cannot be had, at first."""

    broken = True

    def export_copy(self, index: int) -> Tensor:
        if self.broken and index == 2:
            raise ConnectionError("the actor went away")
        return super().export_copy(index)


def test_a_reference_that_was_moved_half_way_is_not_whole(tmp_path: Path) -> None:
    reference = build_reference(
        with_moves(run_config(save_causal_lm(tmp_path / "model"))), get_platform("cpu"), Process()
    )
    policy = Breaks({name: value + 1 for name, value in weights(reference).items()})
    refresh = ReferenceUpdater(policy, reference, settings(0.5, interval=2))
    assert refresh.whole
    refresh(1)
    assert refresh.whole
    with pytest.raises(ConnectionError):
        refresh(2)
    assert not refresh.whole
    with pytest.raises(CheckpointError, match="part of its weights"):
        refresh.save(tmp_path / "iter_0000002")
    assert no_refresh.whole


def test_fp32_moves_are_the_plain_mixture_bit_for_bit(tmp_path: Path) -> None:
    reference = build_reference(
        with_moves(run_config(save_causal_lm(tmp_path / "model"))), get_platform("cpu"), Process()
    )
    policy = {name: torch.randn_like(value) for name, value in weights(reference).items()}
    expected = weights(reference)
    refresh = ReferenceUpdater(Fixed(policy), reference, settings(0.3, interval=1))
    for version in (1, 2, 3):
        refresh(version)
        expected = {name: torch.lerp(value, policy[name], 0.3) for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in weights(reference).items())
