"""Gradients and optimizer off the device between updates: not a bit differs, and what was freed is free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import TrainingError
from rlxf.core.types import Metrics
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from tests.actors import weights
from tests.ranks import on_ranks
from tests.settings import random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm

LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "lora": LORA,
    "lora-bf16": LORA | {"bf16": True},
}
NUM_PAIRS = 5
AWAY = r"off the device; call restore before an update"

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("offload") / "model")


def actor(folder: Path, process: Process | None = None, **settings: Any) -> MegatronActor:
    keys = {"ppo_mini_batch_size": 3, "micro_batch_size": 2, "lr": 1e-2} | settings
    return build_actor(run_config(folder, **keys), get_platform("cpu"), process or Process())


def batch(step: int) -> Any:
    return referenced(random_pairs(NUM_PAIRS, seed=step))


def train(trained: MegatronActor, steps: range, offloads: bool) -> list[Metrics]:
    told = []
    for step in steps:
        told.append(trained.update(batch(step), step))
        if offloads:
            trained.offload()
            trained.restore()
    return told


def equal(found: MegatronActor, expected: MegatronActor) -> bool:
    theirs = weights(expected)
    return all(torch.equal(value, theirs[name]) for name, value in weights(found).items())


def gradient_bytes(of: MegatronActor) -> int:
    buffers = [buffer for chunk in of.trainable.chunks for buffer in chunk.buffers]
    assert buffers
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


class Device:
    """From now on moves are copies, and megatron-core sees which side a tensor is on, as with a real device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: MegatronActor) -> None:
        self.on_host: dict[int, Tensor] = {}  # by the address of their memory, which they keep
        for name in ("offload", "restore"):
            monkeypatch.setattr(of.trainable, name, self._seen_by_megatron(monkeypatch, getattr(of.trainable, name)))

    def _seen_by_megatron(self, monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> Callable[[], None]:
        def seen() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not self.holds(tensor)), raising=False)
                patch.setattr(torch.Tensor, "cpu", lambda tensor: self._to_host(tensor))
                patch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor.clone())
                call()

        return seen

    def _to_host(self, tensor: Tensor) -> Tensor:
        found = tensor.clone()
        self.on_host[found.untyped_storage().data_ptr()] = found
        return found

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is on the host."""
        return tensor.untyped_storage().data_ptr() in self.on_host


def optimizer_tensors(of: MegatronActor) -> tuple[list[Tensor], list[Tensor]]:
    """What the optimizer changes, and its state."""
    parts = [part.optimizer for part in of.trainable.optimizer.chained_optimizers]
    changed = [parameter for part in parts for group in part.param_groups for parameter in group["params"]]
    state = [value for part in parts for entry in part.state.values() for value in entry.values()]
    return changed, state


@kinds
def test_not_a_bit_differs_over_three_updates(folder: Path, kind: str) -> None:
    plain, resting = actor(folder, **KINDS[kind]), actor(folder, **KINDS[kind])
    assert repr(train(resting, range(3), offloads=True)) == repr(train(plain, range(3), offloads=False))
    assert equal(resting, plain)


@kinds
def test_nor_where_the_state_really_moves(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, resting = actor(folder, **KINDS[kind]), actor(folder, **KINDS[kind])
    device = Device(monkeypatch, resting)
    for step in range(3):
        assert repr(resting.update(batch(step), step)) == repr(plain.update(batch(step), step))
        resting.offload()
        changed, state = optimizer_tensors(resting)
        assert len(state) == 2 * len(changed) > 0
        assert all(device.holds(tensor) for tensor in state)
        assert all(device.holds(tensor) == ("bf16" in kind) for tensor in changed)  # in fp32 they are the weights
        resting.restore()
        changed, state = optimizer_tensors(resting)
        assert not any(device.holds(tensor) for tensor in [*changed, *state])
    assert equal(resting, plain)


def test_in_fp32_the_optimizer_still_changes_the_weights_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-core alone would bring copies back, and every weight would be on the device twice."""
    trained = actor(folder)
    Device(monkeypatch, trained)
    train(trained, range(1), offloads=True)
    own = {weight.untyped_storage().data_ptr() for chunk in trained.trainable.chunks for weight in chunk.parameters()}
    changed, _ = optimizer_tensors(trained)
    assert {tensor.untyped_storage().data_ptr() for tensor in changed} <= own


@kinds
def test_gradients_are_free_while_they_are_away(folder: Path, kind: str) -> None:
    trained = actor(folder, **KINDS[kind])
    trained.update(batch(0), 0)
    before = gradient_bytes(trained)
    trained.offload()
    assert gradient_bytes(trained) == 0
    gradients = [
        weight.main_grad for chunk in trained.trainable.chunks for weight in chunk.parameters() if weight.requires_grad
    ]
    assert sum(gradient.untyped_storage().nbytes() for gradient in gradients) == 0
    trained.restore()
    assert gradient_bytes(trained) == before > 0


def test_another_order_is_refused_and_changes_nothing(folder: Path) -> None:
    plain, trained = actor(folder), actor(folder)
    with pytest.raises(TrainingError, match="only what was offloaded can be restored"):
        trained.restore()
    trained.offload()
    with pytest.raises(TrainingError, match="off the device already; call restore before"):
        trained.offload()
    for call in (
        lambda: trained.update(batch(0), 0),
        lambda: trained.prepare(batch(0).select(torch.arange(3)), 0),
        lambda: trained.trainable.step(1e-3),
    ):
        with pytest.raises(TrainingError, match=AWAY):
            call()
        assert trained.is_untouched()
    trained.restore()
    assert repr(train(trained, range(2), offloads=False)) == repr(train(plain, range(2), offloads=False))
    assert equal(trained, plain)


def test_what_was_prepared_is_computed_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, trained = actor(folder, **LORA), actor(folder, **LORA)
    trained.prepare(batch(0).select(torch.arange(3)), 0)
    trained.offload()
    trained.restore()
    counts: list[int] = []
    accumulate = trained.trainable.accumulate
    monkeypatch.setattr(trained.trainable, "accumulate", lambda *args: (counts.append(1), accumulate(*args))[1])
    assert repr(trained.update(batch(0), 0)) == repr(plain.update(batch(0), 0))
    assert len(counts) == 2  # both mini-batches
    assert equal(trained, plain)


def _answers(of: MegatronActor, path: Path) -> list[Any]:
    sequences = random_pairs(4).chosen
    exported = [of.export_copy(index) for index in range(len(of.sync_plan()))]
    of.save_hf(path)
    return [of.token_logps(sequences), of.evaluate(batch(7)), exported]


@kinds
def test_everything_but_an_update_works_while_they_are_away(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, resting = actor(folder, **KINDS[kind]), actor(folder, **KINDS[kind])
    Device(monkeypatch, resting)
    for trained in (plain, resting):
        trained.update(batch(0), 0)
    resting.offload()
    assert repr(_answers(resting, tmp_path / "resting")) == repr(_answers(plain, tmp_path / "plain"))
    assert gradient_bytes(resting) == 0


@pytest.mark.parametrize(("kind", "background"), [("fp32", False), ("bf16", True), ("lora-bf16", False)])
def test_a_checkpoint_of_one_that_rests_is_the_checkpoint(
    folder: Path, tmp_path: Path, kind: str, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, resting = actor(folder, **KINDS[kind]), actor(folder, **KINDS[kind])
    device = Device(monkeypatch, resting)
    for trained in (plain, resting):
        trained.update(batch(0), 0)
    resting.offload()
    resting.save_checkpoint(tmp_path, background=background)
    resting.restore()
    train(resting, range(1, 3), offloads=True)  # also while it is being written
    assert resting.checkpoint_written(wait=True)
    resting.offload()
    resting.load_checkpoint(tmp_path)
    _, state = optimizer_tensors(resting)
    assert all(device.holds(tensor) for tensor in state)
    assert gradient_bytes(resting) == 0
    resting.restore()
    assert repr(train(resting, range(1, 3), offloads=False)) == repr(train(plain, range(1, 3), offloads=False))
    assert equal(resting, plain)


def test_one_that_has_made_no_step_can_rest_and_be_saved(folder: Path, tmp_path: Path) -> None:
    plain, resting = actor(folder, bf16=True), actor(folder, bf16=True)
    resting.offload()
    resting.save_checkpoint(tmp_path)
    resting.restore()
    assert repr(train(resting, range(2), offloads=True)) == repr(train(plain, range(2), offloads=False))
    resting.load_checkpoint(tmp_path)
    assert equal(resting, actor(folder, bf16=True))


def _rank(rank: int, world_size: int, port: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    found = []
    for offloads in (False, True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            trained = actor(folder, process, ppo_mini_batch_size=2, bf16=True)
            if offloads:
                Device(monkeypatch, trained)
            told = train(trained, range(3), offloads)
            if offloads:
                trained.offload()
                (out.parent / "saved").mkdir(exist_ok=True)
                dist.barrier()
                trained.save_checkpoint(out.parent / "saved")
                trained.load_checkpoint(out.parent / "saved")
                assert gradient_bytes(trained) == 0
            found.append((repr(told), weights(trained)))
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def test_two_data_parallel_ranks_with_half_of_the_optimizer_each(folder: Path, tmp_path: Path) -> None:
    on_ranks(_rank, 2, folder, tmp_path / "found.pt")
    (plain, plain_weights), (resting, resting_weights) = torch.load(tmp_path / "found.pt", weights_only=True)
    assert resting == plain
    assert all(torch.equal(value, plain_weights[name]) for name, value in resting_weights.items())
