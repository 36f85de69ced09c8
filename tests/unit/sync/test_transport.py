"""Memory shared between processes: what is read is what was written, no engine keeps it, nothing stays behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlxf.assembly.roles import engine_settings
from rlxf.core.errors import SyncError
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import Sampling
from rlxf.sync.plan import Bucket, Room, TensorSpec, plan_buckets
from rlxf.sync.transports.shared_memory import MemoryAddress, SharedBuckets, this_machine
from tests.rollout_world import HfActor, greedy, load_model, prompt_batch, random_prompts, run_config
from tests.tiny_models import randomize, save_causal_lm

WRITER = """
import sys
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.shared_memory import SharedBuckets, this_machine
shared = SharedBuckets.allocate([Bucket((), 5000), Bucket((), 9000), Bucket((), 10)])
for index, size in enumerate((5000, 9000)):
    shared.slot(index, size).fill_(index + 1)
print(shared.address.path, shared.address.room.size, *shared.address.room.starts, flush=True)
print(this_machine(), flush=True)
for index in sys.stdin:
    shared.slot(int(index), 10).fill_(9)
    print("written", flush=True)
"""


@pytest.fixture
def writer() -> Iterator[subprocess.Popen[str]]:
    """Another process, which has written two buckets of three."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WRITER], stdin=pipe, stdout=pipe, text=True)
    yield process
    process.kill()
    process.communicate()


def address_of(process: subprocess.Popen[str]) -> MemoryAddress:
    assert process.stdout is not None
    path, size, *starts = process.stdout.readline().split()
    assert process.stdout.readline().strip() == this_machine()
    return MemoryAddress(path, Room(tuple(int(start) for start in starts), int(size)))


def test_one_process_reads_what_another_writes_and_the_next_but_one_takes_its_place(
    writer: subprocess.Popen[str],
) -> None:
    assert writer.stdin is not None
    assert writer.stdout is not None
    shared = SharedBuckets.open(address_of(writer))
    first, second = shared.slot(0, 5000), shared.slot(1, 9000)
    assert (first == 1).all()
    assert (second == 2).all()
    writer.stdin.write("2\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "written\n"
    assert (shared.slot(2, 10) == 9).all()
    assert first[:10].tolist() == [9] * 10
    assert (first[10:] == 1).all()
    assert (second == 2).all()


def test_a_killed_actor_leaves_no_file_and_its_engines_their_memory(writer: subprocess.Popen[str]) -> None:
    before = set(os.listdir("/dev/shm"))
    address = address_of(writer)
    shared = SharedBuckets.open(address)
    assert not Path(os.readlink(address.path)).exists()  # it never had a name
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert (shared.slot(1, 9000) == 2).all()
    assert not Path(address.path).exists()
    new = set(os.listdir("/dev/shm")) - before  # another program's, perhaps
    assert address.room.size not in {_size(Path("/dev/shm", name)) for name in new}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # gone already
        return 0


def test_memory_that_cannot_be_opened_says_what_to_do() -> None:
    address = SharedBuckets.allocate([Bucket((), 10)]).address
    with pytest.raises(SyncError, match=r"cannot open .*: No such file.*sync.transport=object_store"):
        SharedBuckets.open(replace(address, path=f"/proc/{os.getpid()}/fd/99999"))


def test_buckets_of_any_size_are_whole_in_their_slots() -> None:
    specs = [TensorSpec(f"model.layers.{i}.weight", (1000 + 300 * i,), "float32") for i in range(5)]
    plan = plan_buckets(specs, 1)
    shared = SharedBuckets.allocate(plan)
    assert len(plan) == 5
    for index, bucket in enumerate(plan):
        for _, view in bucket.views(shared.slot(index, bucket.num_bytes)):
            view.fill_(index)
        if index:
            earlier = plan[index - 1]
            ((_, kept),) = earlier.views(shared.slot(index - 1, earlier.num_bytes))
            assert (kept == index - 1).all()


@pytest.mark.parametrize(("keeps", "whole"), [(False, [3, 4]), (True, [0, 1, 2, 3, 4])])
def test_buckets_that_are_kept_have_room_of_their_own(keeps: bool, whole: list[int]) -> None:
    """Else each takes the room of the last but one."""
    plan = [Bucket((), num_bytes) for num_bytes in (5000, 9000, 10, 4096, 4097)]
    written = SharedBuckets.allocate(plan, keeps=keeps)
    for index, bucket in enumerate(plan):
        written.slot(index, bucket.num_bytes).fill_(index)
    read = SharedBuckets.open(written.address)
    found = [index for index, bucket in enumerate(plan) if (read.slot(index, bucket.num_bytes) == index).all()]
    assert found == whole
    page = mmap.PAGESIZE
    assert written.address.room.size == (page * (2 + 3 + 1 + 1 + 2) if keeps else 2 * 3 * page)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_engine_samples_from_its_own_copy_once_an_update_has_ended(tmp_path: Path, tied: bool) -> None:
    """The vLLM engine has the same test in tests/unit/rollout/test_vllm_engine.py: its process zeroes every payload."""
    folder = save_causal_lm(tmp_path, tied=tied, seed=1)
    actor, engine = HfActor(load_model(folder)), HfEngine(engine_settings(run_config(folder)), get_platform("cpu"))
    randomize(actor.model, seed=2)
    plan = actor.sync_plan()
    written = SharedBuckets.allocate(plan)
    read = SharedBuckets.open(written.address)
    engine.begin_update()
    for index, bucket in enumerate(plan):
        written.slot(index, bucket.num_bytes).copy_(actor.packed_bucket(index))
        engine.load_bucket(bucket, read.slot(index, bucket.num_bytes))
    engine.end_update(1)
    written.slot(0, written.address.room.size).fill_(0xFF)  # NaN in every float type
    assert torch.isnan(read.slot(0, 8).view(torch.float32)).all()
    batch = prompt_batch(random_prompts([4, 9]))
    sampled = engine.generate(batch, Sampling(num_samples=1, max_new_tokens=8, temperature=0))
    assert sampled.sequences.completion_rows() == [greedy(actor.model, row, 8, [2]) for row in batch.prompts.rows()]
