"""The host launches a pass without waiting for the device in any layer, and reads nothing of it before the end."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlxf.assembly.roles import build_actor
from rlxf.platform import Platform, Process
from rlxf.update.actor import MegatronActor, _forward
from tests.cuda_world import CudaOnCpu, twin
from tests.npu_world import NpuOnCpu, torch_npu
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm

__all__ = ["torch_npu", "twin"]

aten = torch.ops.aten
# Calls whose result, or the size of it, the host has to know: on a device it waits for everything before them.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    """Counts the calls that would make the host wait, and reads of tensors as Python numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(name))

    def _counting(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.counts[name] += 1
            return original(tensor, *args, **options)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()
        if func in WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def trained(tmp_path: Path, layers: int, platform: Platform | None = None) -> MegatronActor:
    folder = save_causal_lm(tmp_path / str(layers), tied=True, num_hidden_layers=layers)
    return build_actor(run_config(folder, num_layers=layers, bf16=True), platform or CudaOnCpu(), Process())


def waits(actor: MegatronActor, monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Of a micro-batch's forward and backward pass, from packed tokens to gradients."""
    pairs = referenced(random_pairs(4))
    batches = actor._micro_batches(actor.objective.mini_batch(pairs, torch.arange(4), first_pass=True))
    size = len(actor.objective.sums) + len(actor.objective.maxima)
    actor.trainable.accumulate(_forward, batches, size)  # what is made once is made now
    with monkeypatch.context() as patch, Waits(patch) as seen:
        actor.trainable.accumulate(_forward, batches, size)
    return seen.counts


@pytest.mark.usefixtures("twin", "torch_npu")
@pytest.mark.parametrize("platform", [CudaOnCpu(), NpuOnCpu()], ids=["cuda", "npu"])
def test_no_layer_makes_the_host_wait(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a pass waits for, two layers more do not add to it."""
    few, many = (waits(trained(tmp_path, layers, platform), monkeypatch) for layers in (2, 4))
    # The twins check what their kernels read on the device.
    assert few.pop("numpy") < many.pop("numpy")
    assert few == many


def test_gradients_are_measured_and_clipped_in_one_call_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Apex megatron-core reads the norm of each gradient by itself."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    trained(tmp_path, 2)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) for size in (3, 1000, 17)]
    theirs, overflow = [grad.clone() for grad in grads], torch.zeros(1, dtype=torch.int)
    wanted, _ = utils.local_multi_tensor_l2_norm(1, overflow, [theirs], False)
    utils.local_multi_tensor_scale(1, overflow, [theirs, theirs], 0.3)
    calls = collections.Counter[str]()
    for name in ("_foreach_norm", "_foreach_mul_"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, n=name, f=original: (calls.update([n]), f(*a))[1])
    found, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, overflow, [grads, grads], 0.3)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, grads, theirs))
    assert calls == {"_foreach_norm": 1, "_foreach_mul_": 1}


@pytest.mark.usefixtures("twin")
def test_the_report_is_read_after_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = trained(tmp_path, 2)
    pairs = referenced(random_pairs(4))
    (micro,) = actor._micro_batches(actor.objective.mini_batch(pairs, torch.arange(4), first_pass=True))
    hidden = actor.model.last(micro.packed)
    with monkeypatch.context() as patch, Waits(patch) as seen:
        *_, report = micro.loss(hidden)
        assert not seen.counts["cpu"]
        found = report()
    assert seen.counts["cpu"] >= 1
    assert len(found) == len(actor.objective.sums) + len(actor.objective.maxima)
