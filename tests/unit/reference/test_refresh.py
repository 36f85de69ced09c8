"""A reference that follows the policy: the mixture of TR-DPO, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.config.schema import ReferenceConfig
from rlxf.platform import Process, get_platform
from rlxf.reference.frozen import FrozenReference
from rlxf.sync.refresh import Refresh
from rlxf.update.actor import Actor
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm


def weights(of: Any) -> dict[str, Tensor]:
    names = [name for name, _ in of.model.exported_shapes()]
    return {name: tensor.clone() for name, tensor in of.model.export(names)}


def settings(alpha: float, interval: int = 2) -> ReferenceConfig:
    return ReferenceConfig(model="tiny", ref_update_interval=interval, ref_mixup_alpha=alpha)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_reference_becomes_the_mixture_when_it_is_due(tmp_path: Path, kind: str) -> None:
    folder = save_causal_lm(tmp_path / "model", kind, tied=kind == "llama")
    config = run_config(folder, ppo_mini_batch_size=4, lr=0.1)
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (Actor, FrozenReference))
    refresh = Refresh(actor, reference, settings(0.6))
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
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (Actor, FrozenReference))
    pairs = random_pairs(4)
    actor.update(referenced(pairs), 0)
    Refresh(actor, reference, settings(1.0, interval=1))(1)
    assert all(torch.equal(value, weights(reference)[name]) for name, value in weights(actor).items())


def test_a_saved_reference_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", tied=True)
    config = run_config(folder, ppo_mini_batch_size=4, lr=0.1)
    actor, reference = (room(config, get_platform("cpu"), Process()) for room in (Actor, FrozenReference))
    actor.update(referenced(random_pairs(4)), 0)
    refresh = Refresh(actor, reference, settings(0.5, interval=1))
    refresh(1)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    refresh.save(checkpoint)
    other = FrozenReference(config, get_platform("cpu"), Process())
    Refresh(actor, other, settings(0.5)).load(checkpoint)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(reference).items())
    pairs = random_pairs(3, seed=7)
    assert torch.equal(other.logps(pairs).chosen, reference.logps(pairs).chosen)
