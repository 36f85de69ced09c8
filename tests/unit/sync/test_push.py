"""The push, from a Hugging Face actor into the Hugging Face engine: what arrives, when it is probed, how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.assembly.build_run import build_probe
from rlxf.assembly.roles import engine_settings
from rlxf.config.schema import SyncConfig
from rlxf.core.errors import SyncError
from rlxf.core.types import Tokens
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import Probe
from rlxf.sync.push import LocalSink, WeightSync
from tests.rollout_world import HfActor, load_model, random_prompts, run_config
from tests.tiny_models import randomize, save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("push"), seed=1)


class Journal(LocalSink):
    """A sink that also writes down what was asked of it."""

    def __init__(self, actor: HfActor, engine: HfEngine) -> None:
        super().__init__(actor, engine)
        self.calls: list[str] = []

    def begin_update(self, *, check: bool = False) -> None:
        self.calls.append("begin and check" if check else "begin")
        super().begin_update(check=check)

    def send(self, index: int, bucket: Bucket) -> None:
        self.calls.append("bucket")
        super().send(index, bucket)

    def end_update(self, version: int) -> None:
        self.calls.append("end")
        super().end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[Any]:
        self.calls.append("probe")
        return super().probe(prompt, num_tokens)


class World:
    def __init__(self, folder: Path, actor: HfActor, *, filled: bool = True, **sync: int) -> None:
        config, platform = run_config(folder), get_platform("cpu")
        self.actor = actor
        self.sink = Journal(actor, HfEngine(engine_settings(config), platform))
        self.probe: Probe = build_probe(config, platform, Tokens.from_rows(random_prompts([9, 8])))
        self.sync = WeightSync(actor, self.sink, SyncConfig(**sync), self.probe, filled=filled)

    def probed(self, version: int) -> bool:
        """Push new weights; whether the engine was asked, which is always once before and once after."""
        self.sink.calls.clear()
        randomize(self.actor.model, seed=100 + version)
        report = self.sync.push(version)
        buckets = ["bucket"] * len(self.actor.sync_plan())
        update = [*buckets, "end"]
        assert self.sink.calls in (["begin", *update], ["probe", "begin and check", *update, "probe"])
        assert (report.probe_difference is not None) == ("probe" in self.sink.calls)
        return "probe" in self.sink.calls


def test_the_first_updates_and_every_interval_are_probed(folder: Path) -> None:
    world = World(folder, HfActor(load_model(folder)), verify_first=2, verify_interval=4)
    assert [version for version in range(10) if world.probed(version)] == [1, 2, 4, 8]


def test_without_an_interval_only_the_first_updates_are_probed(folder: Path) -> None:
    world = World(folder, HfActor(load_model(folder)), verify_first=1)
    assert [version for version in range(6) if world.probed(version)] == [1]


def test_a_resumed_run_probes_its_first_push(folder: Path) -> None:
    world = World(folder, HfActor(load_model(folder)), verify_first=1)
    assert [version for version in range(37, 40) if world.probed(version)] == [37]


def test_a_resumed_run_has_the_metrics_of_one_that_was_not(folder: Path) -> None:
    def told(versions: range) -> dict[int, set[str]]:
        world = World(folder, HfActor(load_model(folder)), verify_first=2, verify_interval=5)
        return {version: set(world.sync.push(version).metrics()) for version in versions}

    whole, resumed = told(range(8)), told(range(3, 8))
    assert [version for version, names in whole.items() if "sync/probe_difference" in names] == [1, 2, 5]
    assert resumed == {version: whole[version] for version in range(3, 8)}


def test_an_engine_without_weights_is_not_asked_before_its_first_push(folder: Path) -> None:
    world = World(folder, HfActor(load_model(folder)), filled=False, verify_first=2)
    world.sink.begin_update()  # as an engine that waits for the weights of a megatron checkpoint
    world.sink.calls.clear()
    assert world.sync.push(37).probe_difference is not None
    assert (world.sink.calls[0], world.sink.calls[-1]) == ("begin and check", "probe")
    assert world.probed(38)


def test_the_report_counts_what_travelled(folder: Path) -> None:
    world = World(folder, HfActor(load_model(folder)))
    report = world.sync.push(0)
    parameters = sum(parameter.numel() * 4 for parameter in world.actor.model.parameters())
    assert parameters <= report.num_bytes < parameters + 64 * 30
    assert report.version == 0
    assert report.seconds > 0


class StaleHead(HfActor):
    """Sends the head that it had when it was built."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._head = model.lm_head.weight.detach().clone()

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().bucket_tensors(index):
            yield name, self._head if name == "lm_head.weight" else tensor


def test_a_stale_head_fails_the_probe(folder: Path) -> None:
    world = World(folder, StaleHead(load_model(folder)), verify_first=1)
    world.sync.push(0)
    with pytest.raises(SyncError, match="does not hold the actor's weights at version 1"):
        world.probed(1)


class NotANumber(HfActor):
    """Its weights arrive with a NaN in one of them."""

    spoilt = False

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().bucket_tensors(index):
            if self.spoilt and name == "model.norm.weight":
                tensor = tensor.clone()
                tensor[0] = torch.nan
            yield name, tensor


def test_a_nan_in_the_weights_of_an_engine_fails_the_probe(folder: Path) -> None:
    world = World(folder, actor := NotANumber(load_model(folder)), verify_first=1)
    world.sync.push(0)
    actor.spoilt = True
    with pytest.raises(SyncError, match=r"version 1: .* differ from the actor's by nan on average"):
        world.probed(1)


class Interrupted(HfActor):
    fail = True

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        if self.fail and index == 1:
            raise ConnectionError("the actor went away")
        return super().bucket_tensors(index)


def test_a_push_that_broke_off_can_be_repeated(folder: Path) -> None:
    actor = Interrupted(load_model(folder))
    world = World(folder, actor, verify_first=1)
    randomize(actor.model, seed=4)
    with pytest.raises(ConnectionError):
        world.sync.push(1)
    with pytest.raises(SyncError, match="mixture"):
        world.sink.probe(world.probe.prompt, 4)
    actor.fail = False
    report = world.sync.push(1)
    assert report.probe_difference is not None
    assert report.probe_difference < 1e-5
    answer = world.sink.probe(world.probe.prompt, 4)[0]
    assert answer.policy_version == 1
    assert torch.tensor(answer.logps).isfinite().all()
