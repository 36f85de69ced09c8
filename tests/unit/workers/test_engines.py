"""Rollout engines that are lost, without a cluster: what is sampled again, where, and from which weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlxf.config.schema import SyncConfig
from rlxf.core.errors import SyncError, WorkerLost
from rlxf.core.model_folder import Files
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Tokens
from rlxf.rollout.engine import Completion, ProbeResult, Sampling, WeightState, pack_rollouts
from rlxf.rollout.session import WholeSession
from rlxf.sync.checksums import Checksums, checksums
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.probe import Probe
from rlxf.sync.push import WeightSync
from rlxf.sync.saved import save_buckets
from tests.rollout_world import prompt_batch
from tests.unit.workers.fakes import AtOnce, Process, Ref, Starts, member
from workers import group as module
from workers.actor import Sent
from workers.group import WorkerGroup
from workers.remote import Pending
from workers.rollout import RemoteEngines

PLAN = plan_buckets([TensorSpec(f"layers.{i}.w", (4,), "float32", 0) for i in range(5)], 1)
SAMPLING = Sampling(num_samples=2, max_new_tokens=4)
PROMPTS = prompt_batch([[5], [6, 7], [8], [9, 10], [11]])
FILES: Files = ("/models/tiny", (("model.safetensors", 100, 7),))
FOLDER = -1.0  # what every weight is in an engine that has only loaded its folder


class Engine:
    """Its completions are its weight, an update's buckets have to come whole, and it refuses as real ones do."""

    def __init__(self) -> None:
        self.state = WeightState()
        self.damage = 0  # of what it says that it received
        self.files: Files | None = FILES
        self.weights = dict.fromkeys((spec.name for bucket in PLAN for spec in bucket.tensors), FOLDER)

    def open_receivers(self, *_: object) -> None: ...

    def start_files(self) -> Files | None:
        return self.files

    def begin_update(self) -> None:
        self.state.begin()
        self.missing = set(self.weights)

    def load_bucket(self, bucket: Bucket, payload: Any) -> None:
        with self.state.receiving():
            for name, tensor in bucket.views(torch.as_tensor(payload)):
                self.weights[name] = float(tensor[0])
                self.missing.discard(name)

    load_copy = load_bucket

    def receive(self, bucket: Bucket, message: Any, check: bool, *others: Any) -> list[Checksums]:
        self.load_bucket(bucket, message)
        return [checksums(bucket, torch.as_tensor(message) + self.damage)] if check else []

    def end_update(self, version: int) -> None:
        with self.state.receiving():
            assert not self.missing
        self.state.end(version)

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        self.state.require_ready()
        (weight,) = set(self.weights.values())
        rows = [Completion(tokens=[int(weight) + 100], logps=[0.0])] * (len(prompts) * sampling.num_samples)
        return pack_rollouts(prompts, sampling.num_samples, rows, self.state.version)

    def session(self, sampling: Sampling) -> WholeSession:
        self.state.require_ready()
        return WholeSession(self.generate, sampling)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        self.state.require_ready()
        return ProbeResult(completion=[1] * num_tokens, logps=[0.0] * num_tokens, policy_version=self.state.version)


class Actor:
    """All its weights are one number."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.copies: list[int] = []

    def sync_plan(self) -> tuple[Bucket, ...]:
        return PLAN

    def join_receivers(self) -> list[Pending]:
        return []

    def start_files(self) -> list[Files | None]:
        return [FILES, FILES]

    def payload(self, index: int) -> np.ndarray[Any, Any]:
        payload = torch.empty(PLAN[index].num_bytes, dtype=torch.uint8)
        PLAN[index].fill(payload, [(spec.name, torch.full(spec.shape, self.weight)) for spec in PLAN[index].tensors])
        return payload.numpy()

    def send_bucket(self, index: int, *, check: bool) -> Sent:
        return self._sent("send_bucket", index, self.payload(index), check=check)

    def _sent(self, method: str, index: int, payload: Any, *, check: bool) -> Sent:
        message, done = (Ref(Process(self), method) for _ in range(2))
        message.answer = payload
        done.answer = checksums(PLAN[index], torch.as_tensor(payload)) if check else None
        return Sent([Pending(done, "train rank 0", method)], message)

    def send_saved_bucket(self, index: int, checkpoint: Path, *, check: bool) -> Sent:
        from rlxf.sync.saved import saved_tensors

        payload = torch.empty(PLAN[index].num_bytes, dtype=torch.uint8)
        PLAN[index].fill(payload, saved_tensors(checkpoint, PLAN[index]))
        return self._sent("send_saved_bucket", index, payload.numpy(), check=check)

    def export_copy(self, index: int) -> Any:
        self.copies.append(index)
        return self.payload(index)

    def token_logps(self, sequences: Sequences) -> Tensor:
        return torch.zeros(int(sequences.completion_lengths.sum()))


class Wire:
    """A transport whose messages are the bytes."""

    name, title = "object_store", "wire"
    everywhere, keeps_what_was_sent = False, True

    def __init__(self, window: int = 1) -> None:
        self.window = window
        self.connections = 0

    def connect(self, actor: Any, sink: Any, *, keeps: bool) -> str:
        self.connections += 1
        sink.open_receivers(self, "address")
        return "address"

    def receiver(self, address: str, place: Any) -> Any:
        return self

    def receive(self, bucket: Bucket, message: Any) -> Tensor:
        return torch.as_tensor(message)


class World:
    """Engines of a run in which version 1 has been pushed."""

    def __init__(self, *dies_in: list[str], keeps: bool = False, window: int = 1, pushes: bool = True) -> None:
        self.actor, self.wire, self.waiter = Actor(), Wire(window), AtOnce()
        self.later: list[list[str]] = []  # methods in which the processes die that take the places of others
        self.starts = Starts(lambda rank: Process(Engine(), self.later.pop(0) if self.later else ()))
        self.processes = [Process(Engine()) for _ in dies_in]
        members = [member(process, rank) for rank, process in enumerate(self.processes)]
        self.group = WorkerGroup(members, self.waiter, self.starts)
        actor: Any = self.actor
        wire: Any = self.wire
        self.engines = RemoteEngines(self.group, actor, choose=lambda: wire, keeps=keeps)
        self.engines.connect()
        probe = Probe(prompt=Tokens.from_rows([[5, 6]]), num_tokens=3, tolerance=1e-4)
        self.sync = WeightSync(actor, self.engines, SyncConfig(verify_first=1, verify_interval=0), probe)
        if pushes:
            self.sync.push(1)
        for process, methods in zip(self.processes, dies_in, strict=True):
            process.dies_in += methods

    def calls(self, rank: int) -> list[str]:
        """Of the process that has the rank now, but for the pushes and probes."""
        skip = ("begin_update", "receive", "load_copy", "end_update", "open_receivers", "probe")
        return [call for call in self.group.members[rank].handle.calls if call not in skip]


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "put", lambda value: value)


class Start:
    """Engines and actor that have loaded the same files, and nothing is pushed yet."""

    def __init__(self, *dies_in: list[str], keeps: bool = False, alike: bool = True) -> None:
        self.world = World(*dies_in, keeps=keeps, pushes=False)
        self.engines = [process.room for process in self.world.processes]
        self.begin(alike=alike)

    def begin(self, *, alike: bool = True) -> None:
        """The run begins with what is loaded; again when a trainer without a checkpoint is lost."""
        probe = Probe(prompt=Tokens.from_rows([[5, 6]]), num_tokens=3, tolerance=1e-4)
        actor: Any = self.world.actor
        actor.weight = FOLDER
        self.sync = WeightSync(actor, self.world.engines, SyncConfig(verify_first=1), probe, alike=alike)

    def pushes(self) -> int:
        return self.world.processes[0].calls.count("begin_update")


def test_what_both_sides_loaded_is_not_pushed() -> None:
    start = Start([], [])
    assert start.sync.push(0).num_bytes == 0
    assert start.pushes() == 0
    assert_whole(start.world.engines.generate(PROMPTS, SAMPLING), version=0, weight=int(FOLDER))
    start.sync.push(1)
    start.sync.push(0)  # from here on only a push says what they hold
    assert start.pushes() == 2


@pytest.mark.parametrize(
    "files",
    [None, ("/models/tiny", (("model.safetensors", 100, 8),)), ("/other/tiny", (("model.safetensors", 100, 7),))],
    ids=["unknown", "changed since", "another folder"],
)
def test_other_files_are_pushed(files: Files | None) -> None:
    start = Start([], [])
    start.engines[1].files = files
    start.sync.push(0)
    assert start.pushes() == 1


def test_weights_that_are_in_no_file_are_pushed() -> None:
    start = Start([], alike=False)
    start.sync.push(0)
    assert start.pushes() == 1


@pytest.mark.parametrize("keeps", [False, True])
def test_an_engine_that_is_started_again_gets_what_the_others_loaded(keeps: bool) -> None:
    start = Start(["generate"], keeps=keeps)
    start.sync.push(0)
    if keeps:  # the trainer is at work meanwhile
        start.world.actor.weight = 2.0
    assert_whole(start.world.engines.generate(PROMPTS, SAMPLING), version=0, weight=int(FOLDER))
    assert start.world.calls(0).count("build") == 1


def test_a_trainer_that_begins_anew_pushes_what_the_engines_no_longer_hold() -> None:
    start = Start([], [])
    start.sync.push(0)
    start.world.actor.weight = 2.0
    start.sync.push(1)
    start.world.engines.begin_again()
    start.begin()
    start.sync.push(0)
    assert start.pushes() == 2
    assert_whole(start.world.engines.generate(PROMPTS, SAMPLING), version=0, weight=int(FOLDER))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_trainer_that_begins_anew_before_any_push_is_connected(keeps: bool) -> None:
    start = Start(["generate"], keeps=keeps)
    start.sync.push(0)
    start.world.engines.begin_again()
    start.begin()
    start.sync.push(0)
    assert (start.pushes(), start.world.wire.connections) == (0, 2)
    assert_whole(start.world.engines.generate(PROMPTS, SAMPLING), version=0, weight=int(FOLDER))


def test_a_tensor_that_an_engine_received_changed_ends_the_push() -> None:
    world = World([], [], pushes=False)
    world.processes[1].room.damage = 1
    with pytest.raises(SyncError, match=r"rank 1 on node a received other bytes .* layers\.0\.w"):
        world.sync.push(1)


def assert_whole(rollouts: Rollouts, version: int = 1, weight: int = 1) -> None:
    """Every prompt has been sampled from that version's weights, in the order of the prompts."""
    assert rollouts.sequences.prompt_rows() == [row for row in PROMPTS.prompts.rows() for _ in range(2)]
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert rollouts.sample_index.tolist() == [0, 1] * 5
    assert set(rollouts.policy_version.tolist()) == {version}
    assert {tuple(row) for row in rollouts.sequences.completion_rows()} == {(weight + 100,)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dies_in", [([], [], []), (["generate"], [], ["generate"])])
def test_completions_come_in_the_order_of_the_prompts(dies_in: tuple[list[str], ...], seed: int) -> None:
    world, draw = World(*map(list, dies_in)), random.Random(seed)
    world.waiter.choose, world.waiter.late = draw.choice, set()
    assert_whole(world.engines.generate(PROMPTS, SAMPLING))


def test_an_engine_that_is_free_takes_over_while_the_lost_one_loads() -> None:
    world = World(["generate"], [])
    assert_whole(world.engines.generate(PROMPTS, SAMPLING))
    assert world.calls(1) == ["generate", "generate"]
    assert world.calls(0) == ["build"]  # has loaded, and nobody has waited for it
    assert world.starts.started == [0]


def test_an_engine_that_has_loaded_samples_from_the_weights_of_the_others() -> None:
    world = World(["generate"])  # nobody can take over
    assert_whole(world.engines.generate(PROMPTS, SAMPLING))
    assert world.calls(0) == ["build", "generate"]
    assert world.actor.copies == list(range(len(PLAN)))
    assert world.starts.back == [0]


def test_a_run_that_looks_ahead_fills_it_with_the_copy_of_what_was_pushed() -> None:
    world = World(["generate"], keeps=True)
    world.actor.weight = 2.0  # the trainer is at work meanwhile
    assert_whole(world.engines.generate(PROMPTS, SAMPLING))
    assert world.actor.copies == []


@pytest.mark.parametrize("keeps", [False, True])
def test_what_was_pushed_from_a_checkpoint_is_what_it_gets(tmp_path: Path, keeps: bool) -> None:
    world = World(["generate"], keeps=keeps)
    world.actor.weight = 4.0
    save_buckets(tmp_path, PLAN, lambda index: torch.from_numpy(world.actor.payload(index)))
    world.actor.weight = 5.0
    world.sync.push_saved(tmp_path, 4)
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=4, weight=4)
    world.sync.push(5)
    world.group.members[0].handle.dies_in.append("generate")
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=5, weight=5)


def test_an_engine_without_the_weights_would_be_noticed() -> None:
    process = Process(Engine())
    process.room.state.begin()
    with pytest.raises(SyncError, match="mixture"):
        process.room.generate(PROMPTS, SAMPLING)


def test_two_engines_that_are_lost_over_the_same_prompts_end_the_run() -> None:
    world = World(["generate"], [])
    answer = world.processes[1].room.generate

    def answer_once(prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        world.processes[1].dies_in.append("generate")  # its own share is done; it dies over the first one's
        found: Rollouts = answer(prompts, sampling)
        return found

    world.processes[1].room.generate = answer_once
    with pytest.raises(WorkerLost, match="lost rank 1 on node a during generate"):
        world.engines.generate(PROMPTS, SAMPLING)
    assert world.starts.started == [0]


@pytest.mark.parametrize("method", ["build", "load_copy", "end_update", "generate"])
def test_an_engine_that_is_lost_again_before_it_has_sampled_ends_the_run(method: str) -> None:
    world = World(["generate"])
    world.later = [[method]]
    with pytest.raises(WorkerLost, match=f"lost rank 0 on node a during {method}"):
        world.engines.generate(PROMPTS, SAMPLING)
    assert (world.starts.started, world.starts.back) == ([0], [])


def test_it_may_be_lost_again_in_a_later_step() -> None:
    world = World(["generate"], [])
    for _ in range(4):
        assert_whole(world.engines.generate(PROMPTS, SAMPLING))
        world.sync.push(1)
        world.group.members[0].handle.dies_in.append("generate")
    assert world.starts.started == [0] * 4
    assert world.starts.back == [0] * 4


@pytest.mark.parametrize("method", ["begin_update", "receive", "end_update"])
@pytest.mark.parametrize("window", [1, 2])
def test_a_push_in_which_an_engine_is_lost_is_repeated_in_full(method: str, window: int) -> None:
    world = World([], [method], window=window)
    world.actor.weight = 2.0
    report = world.sync.push(2)
    assert report.probe_difference == 0.0  # of all engines, though this version was not to be probed
    assert world.wire.connections == 2
    assert not world.engines.renewed
    assert world.starts.back == [1]
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=2, weight=2)
    assert world.sync.push(3).probe_difference is None


def test_an_engine_that_is_lost_in_the_probe_is_pushed_and_probed_again() -> None:
    world = World(["generate"], [])
    world.engines.generate(PROMPTS, SAMPLING)
    world.processes[1].dies_in.append("probe")
    world.actor.weight = 2.0
    assert world.sync.push(2).probe_difference == 0.0
    assert world.starts.started == [0, 1]
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=2, weight=2)


def test_two_losses_in_one_push_end_the_run() -> None:
    world = World([], ["receive"])
    world.later = [["receive"]]
    with pytest.raises(WorkerLost, match="lost rank 1 on node a during receive"):
        world.sync.push(2)
    assert world.starts.started == [1]


def test_a_push_that_fails_although_every_engine_lives_ends_the_run() -> None:
    world = World([], [])

    def gone(index: int, *, check: bool) -> Sent:
        raise WorkerLost("lost train rank 0")

    world.actor.send_bucket = gone  # type: ignore[method-assign]
    with pytest.raises(WorkerLost, match="lost train rank 0"):
        world.sync.push(2)
    assert world.starts.started == []


def test_an_engine_that_was_started_again_is_connected_and_probed_in_the_next_push() -> None:
    world = World(["generate"], [])
    world.engines.generate(PROMPTS, SAMPLING)
    assert (world.engines.renewed, world.wire.connections) == (True, 1)
    world.actor.weight = 2.0
    assert world.sync.push(2).probe_difference == 0.0
    assert (world.engines.renewed, world.wire.connections) == (False, 2)
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=2, weight=2)


def test_after_the_trainer_was_started_again_the_next_push_connects_again() -> None:
    world = World([], [])
    world.engines.begin_again()
    world.sync.push(0)
    assert world.wire.connections == 2
    assert_whole(world.engines.generate(PROMPTS, SAMPLING), version=0)


def test_engines_that_nobody_starts_again_end_the_run() -> None:
    world = World(["generate"], [])
    world.group.starts = None
    with pytest.raises(WorkerLost):
        world.engines.generate(PROMPTS, SAMPLING)


def test_what_broke_off_while_an_engine_loaded_is_made_up_for_by_the_next_push() -> None:
    """The trainer was lost meanwhile, or a signal came: whoever samples gives up."""
    world = World(["generate"])
    first: Callable[..., Any] = world.waiter.first

    def give_up(calls: Any) -> Any:
        if world.starts.started:
            raise SyncError("given up")
        return first(calls)

    world.waiter.first = give_up  # type: ignore[method-assign]
    with pytest.raises(SyncError, match="given up"):
        world.engines.generate(PROMPTS, SAMPLING)
    world.waiter.first = first  # type: ignore[method-assign]
    world.engines.begin_again()
    world.sync.push(1)
    assert_whole(world.engines.generate(PROMPTS, SAMPLING))
    assert world.starts.started == [0]
