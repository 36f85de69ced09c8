"""From any training layout into every rollout replica: after a push the engines hold the trainer's weights, bit by bit.

A rollout engine that splits its model (vLLM with tensor parallelism) takes the same whole Hugging Face tensors as one
that does not and cuts them itself, so the wire has no rollout layout in it. vLLM does that on accelerators only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from rlxf.assembly.build_run import build_probe
from rlxf.assembly.roles import engine_settings
from rlxf.config.schema import SyncConfig
from rlxf.core.errors import WorkerLost
from rlxf.core.types import Tokens
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.push import WeightSync
from rlxf.sync.transports import TRANSPORTS, Transport
from rlxf.sync.transports.transport import Address, Receiver, ReceiverPlace
from tests.device_twin import VISIBLE, TwinPlatform
from tests.ranks import Ranks, recipe
from tests.rollout_world import random_prompts
from tests.tiny_models import save_causal_lm

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
VP2 = {"virtual_pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 2048}

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("tp2", 2, TP2),
    ("pp2", 2, PP2),
    ("dp2", 2, {}),  # the distributed optimizer: each rank updates half of the parameters
    ("tp2-pp2", 4, TP2 | PP2),
]
SLOW: list[tuple[str, int, dict[str, Any]]] = [
    ("pp2-vp2", 2, PP2 | VP2),
    ("pp4", 4, {"pipeline_model_parallel_size": 4}),
    ("tp2-sp-dp2", 4, TP2 | SP),
    ("pp2-cp2", 4, PP2 | CP2),
]
PARAMETERS = [pytest.param(case[1:], id=case[0]) for case in CASES]
PARAMETERS += [pytest.param(case[1:], id=case[0], marks=pytest.mark.slow) for case in SLOW]


class Replicas:
    """A sink of several engines."""

    renewed = False  # they stay as they are

    renewed = False

    def __init__(self, ranks: Ranks, engines: list[HfEngine]) -> None:
        self._ranks, self._engines = ranks, engines
        self._receivers: list[Receiver] = []

    def connect(self, transport: Transport) -> None:
        self.transport = transport.name
        transport.connect(self._ranks, self)

    @property
    def num_receivers(self) -> int:
        return len(self._engines)

    def open_receivers(self, transport: Transport, address: Address) -> None:
        """On the devices of the last ranks; each in a thread, because receivers may have to meet."""

        def receiver(number: int) -> Receiver:
            where = str(self._ranks.world_size - 1 - number)
            with patch.dict(os.environ, {VISIBLE: where}):
                return transport.receiver(address, ReceiverPlace(number=number, platform=TwinPlatform(), where=where))

        def open_all() -> None:
            if transport.name == "collective":
                with ThreadPoolExecutor() as pool:
                    self._receivers = list(pool.map(receiver, range(len(self._engines))))
            else:
                self._receivers = [receiver(number) for number in range(len(self._engines))]

        self._ranks.join_receivers(open_all)

    def holds_start(self) -> bool:
        return False

    def keep_start(self) -> None:
        raise AssertionError("they loaded other files")

    def begin_update(self, *, check: bool = False) -> None:
        for engine in self._engines:
            engine.begin_update()

    def send(self, index: int, bucket: Bucket) -> None:
        message = self._ranks.send_bucket(index)
        with ThreadPoolExecutor() as pool:  # a broadcast reaches all of them at once
            payloads = list(pool.map(lambda receiver: receiver.receive(bucket, message), self._receivers))
        for engine, payload in zip(self._engines, payloads, strict=True):
            engine.load_bucket(bucket, payload)

    def end_update(self, version: int) -> None:
        for engine in self._engines:
            engine.end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return [engine.probe(prompt, num_tokens) for engine in self._engines]

    def recover(self, lost: WorkerLost) -> None:
        raise lost


@pytest.fixture(scope="module", params=PARAMETERS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks of a tied and of an untied model, in one layout."""
    world_size, layout = request.param
    root = tmp_path_factory.mktemp("layout")
    folders = [save_causal_lm(root / str(tied), tied=tied, seed=1, num_hidden_layers=4) for tied in (False, True)]
    processes = Ranks(folders, world_size, lr=1e-2, ppo_mini_batch_size=2, **layout)
    yield processes
    processes.close()


def weights(engine: HfEngine) -> dict[str, torch.Tensor]:
    return engine._parameters


def folder_like(model: Path, folder: Path) -> Path:
    """A copy of a model folder, whose weights can be replaced."""
    return Path(shutil.copytree(model, folder))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_engines_hold_what_the_ranks_hold(ranks: Ranks, tied: bool, tmp_path: Path) -> None:
    ranks.actor = int(tied)
    other = save_causal_lm(tmp_path / "other", tied=tied, seed=2, num_hidden_layers=4)  # what the engines start from
    config, platform = recipe(other), get_platform("cpu")
    engines = [HfEngine(engine_settings(config), platform) for _ in range(2)]
    probe = build_probe(config, platform, Tokens.from_rows(random_prompts([9, 8])))
    sink = Replicas(ranks, engines)
    sync = WeightSync(ranks, sink, SyncConfig(verify_first=5), probe)
    assert len(ranks.sync_plan()) == 3  # more than there are slots
    ranks.keep_pushed()
    folder = tmp_path
    for version, transport in enumerate(("shared_memory", "shared_memory", "object_store", "ipc", "collective")):
        sink.connect(TRANSPORTS[transport])  # again each time, as after a process was replaced
        if version:
            ranks.update(version)
            assert all(ranks.differences(folder))  # every rank has trained, and the engines do not know it yet
            for index, bucket in enumerate(ranks.sync_plan()):  # but what they hold can still be had
                for name, tensor in bucket.views(ranks.pushed_copy(index)):
                    assert torch.equal(tensor, weights(engines[0])[name])
        report = sync.push(version)
        assert (report.probe_difference is not None) == (version > 0)
        folder = tmp_path / f"version{version}"
        save_file(weights(engines[0]), folder_like(other, folder) / "model.safetensors", metadata={"format": "pt"})
        assert not any(ranks.differences(folder))
        assert all(torch.equal(value, weights(engines[1])[name]) for name, value in weights(engines[0]).items())
