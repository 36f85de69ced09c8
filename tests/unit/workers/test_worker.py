"""What Ray's worker processes have in common, without a cluster."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from rlxf.rollout.engine import Sampling
from workers.actor import ActorWorker
from workers.engine import RolloutWorker
from workers.worker import Worker


def test_the_port_of_a_groups_rendezvous_is_held_from_the_start() -> None:
    worker = Worker(0, 2)
    _, port = worker.address()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))


def test_a_group_of_one_needs_no_port() -> None:
    assert Worker(0, 1).address() == ("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("method", "args", "phase"),
    [
        ("checkpoint_written", (False,), "checkpoint_written"),
        ("checkpoint_written", (True,), "checkpoint_written (waits)"),
        ("save_checkpoint", ("folder", True), "save_checkpoint"),
        ("save_checkpoint", ("folder", False), "save_checkpoint (waits)"),
        ("update", ("batch", 1), "update"),
    ],
)
def test_to_write_a_checkpoint_is_another_phase_than_to_ask_for_it(
    method: str, args: tuple[object, ...], phase: str
) -> None:
    """A question takes milliseconds, and ten times their median is no limit for gigabytes."""
    assert ActorWorker(0, 1)._phase_of(method, args) == phase


def test_an_evaluations_samples_are_a_phase_of_their_own() -> None:
    worker = RolloutWorker(0, 1)
    sampling = Sampling(num_samples=1, max_new_tokens=1)
    assert worker._phase_of("generate", ("prompts", sampling)) == "generate"
    assert worker._phase_of("generate", ("prompts", replace(sampling, purpose="eval"))) == "generate (eval)"
    assert worker._phase_of("load_bucket", ("bucket", 3)) == "load_bucket"


@pytest.mark.parametrize("write", ["save_checkpoint", "save_hf"])
def test_a_trainer_writes_nothing_that_others_see_without_its_driver(write: str, tmp_path: Path) -> None:
    written: list[str] = []

    class Room:
        def save_checkpoint(self, folder: Path, background: bool) -> None:
            written.append("checkpoint")

        def save_hf(self, folder: Path) -> None:
            written.append("policy")

    class Lost:
        def require_driver(self) -> None:
            raise RuntimeError("nothing was heard of the driver")

    worker = ActorWorker(0, 1)
    worker.room, worker.signs = Room(), Lost()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="driver"):
        getattr(worker, write)(tmp_path, *([False] if write == "save_checkpoint" else []))
    assert written == []
