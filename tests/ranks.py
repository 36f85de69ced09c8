"""The actor on several real processes, as the driver's Ray proxies see it: every rank gets every call.

A server process imports torch and megatron once and forks the ranks, as in tests/runs/killed.py.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.config.schema import RunConfig, SyncConfig
from rlxf.core.types import Sequences
from rlxf.platform import Process
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Sender, SenderPlace, Transport
from tests.device_twin import VISIBLE, TwinPlatform
from tests.ports import free_port
from tests.settings import random_pairs, referenced, run_config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs.warm"])
_DEADLINE_S = 120  # of one call, on busy cores
NUM_PAIRS = 7  # odd on purpose: no size divides it


def on_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run ``function(rank, world_size, port, *arguments)`` in so many fresh processes, and wait for all of them."""
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}):
        given = (world_size, free_port(), *arguments)
        mp.start_processes(function, args=given, nprocs=world_size, start_method="forkserver")


def recipe(folder: Path, **settings: Any) -> RunConfig:
    """With buckets as small as they can be."""
    return run_config(folder, num_layers=4, **settings).model_copy(update={"sync": SyncConfig(bucket_mb=1)})


class Ranks:
    """``world_size`` processes, each with its share of an actor for every folder; speaks for one of the actors."""

    def __init__(self, folders: list[Path], world_size: int, **settings: Any) -> None:
        port, self._connections, self._processes = free_port(), list[Connection](), []
        self.world_size = world_size
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}):
            for rank in range(world_size):
                mine, theirs = _CONTEXT.Pipe()
                place = Process(rank=rank, world_size=world_size, master_port=port)
                process = _CONTEXT.Process(target=_serve, args=(theirs, place, folders, settings), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(mine)
                self._processes.append(process)
        self.actor = 0  # which one speaks
        self._receive()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def update(self, step: int) -> None:
        self._call("update", step)

    def differences(self, folder: Path) -> list[list[str]]:
        """For each rank, the parameters that differ in any bit from those of the model in ``folder``."""
        return self._call("differences", folder)

    def sync_plan(self) -> tuple[Bucket, ...]:
        plan: tuple[Bucket, ...] = self._call("sync_plan")[0]
        return plan

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool = False) -> Address:
        return transport.joined(self._call("open_sender", transport, num_receivers, keeps))

    def join_receivers(self, meanwhile: Callable[[], None]) -> None:
        """The senders meet the receivers that ``meanwhile`` opens."""
        for connection in self._connections:
            connection.send((self.actor, "join_receivers", ()))
        meanwhile()
        self._receive()

    def send_bucket(self, index: int) -> Message:
        return self._call("send_bucket", index)[0]

    def keep_pushed(self) -> None:
        self._call("keep_pushed")

    def pushed_copy(self, index: int) -> Tensor:
        payload: Tensor = self._call("pushed_copy", index)[0]
        return payload

    def token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._call("token_logps", sequences)[0]
        return logps

    def _call(self, method: str, *args: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((self.actor, method, args))
        return self._receive()

    def _receive(self) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(_DEADLINE_S), f"rank {rank} did not answer"
            answer = connection.recv()
            if isinstance(answer, Exception):
                raise answer
            answers.append(answer)
        return answers


class Rank:
    """One process' side."""

    def __init__(self, folder: Path, place: Process, settings: dict[str, Any]) -> None:

        os.environ[VISIBLE] = str(place.rank)  # every rank has a device of its own
        self._platform = TwinPlatform()
        self._actor = build_actor(recipe(folder, **settings), self._platform, place)
        self._rank = place.rank

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool) -> Address:
        place = SenderPlace(
            rank=self._rank, platform=self._platform, where=str(self._rank), num_receivers=num_receivers, timeout_s=60
        )
        self._sender: Sender = transport.sender(self._actor.sync_plan(), place, keeps=keeps)
        self._everywhere = transport.everywhere
        return self._sender.address

    def join_receivers(self) -> None:
        self._sender.join()

    def keep_pushed(self) -> None:
        self._actor.keep_pushed()

    def pushed_copy(self, index: int) -> Tensor:
        return self._actor.pushed_copy(index)

    def sync_plan(self) -> tuple[Bucket, ...]:
        return self._actor.sync_plan()

    def send_bucket(self, index: int) -> Message:
        if index == 0:
            self._actor.begin_push()
        return self._sender.send(index, self._actor.bucket_tensors(index, everywhere=self._everywhere))

    def token_logps(self, sequences: Sequences) -> Tensor:
        return self._actor.token_logps(sequences)

    def update(self, step: int) -> None:
        self._actor.update(referenced(random_pairs(NUM_PAIRS, seed=step)), step)

    def differences(self, folder: Path) -> list[str]:
        from rlxf.models.megatron.model import MegatronModel

        mine = self._actor.model
        loaded = MegatronModel(str(folder), platform=self._platform, layout=mine.layout, dtype=mine.dtype)
        return [
            name
            for chunk, other in zip(mine.chunks, loaded.chunks, strict=True)
            for (name, weight), theirs in zip(chunk.named_parameters(), other.parameters(), strict=True)
            if not torch.equal(weight, theirs)
        ]


def _serve(connection: Connection, place: Process, folders: list[Path], settings: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        ranks = [Rank(folder, place, settings) for folder in folders]
        connection.send("ready")
        while True:
            actor, method, args = connection.recv()
            connection.send(getattr(ranks[actor], method)(*args))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  handed to the test
        connection.send(error)
