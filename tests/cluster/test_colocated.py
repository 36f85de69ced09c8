"""Roles that share devices: the numbers of roles with devices of their own, and memory that never overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Recipe
from tests.cluster.faults import Fault, happened
from tests.cluster.faults import run as faulty
from tests.cluster.recorded import Recorded
from tests.cluster.recorded import run as recorded
from tests.cluster.test_launch import numbers, succeed
from tests.cluster.test_resume import weights

pytestmark = pytest.mark.cluster

# The scores of the second step's completions are all the same, so it has no pair.
REWARD = """
calls = 0

def reward(prompts, completions, completion_ids, **columns):
    global calls
    calls += 1
    return [0.0 if calls == 2 else float(sum(ids) % 7) for ids in completion_ids]
"""
COMMON = ("training.train_iters=4", "training.save_interval=2", "log.rollouts=true", "resilience.max_recoveries=20")
ALL = "resource_pool.colocate=[train,infer,ref,reward]"
SHARED = (ALL, "resource_pool.actor_rollout=1")
TWO_DEVICES = (
    *(ALL, "resource_pool.actor_rollout=2", "actor_rollout.num_gpus_for_train=2"),
    *("actor_rollout.num_gpus_for_infer=2", "actor_rollout.ppo_mini_batch_size=2"),
)


def rewarded(folder: Path) -> tuple[str, ...]:
    """A reward that leaves one step without a pair."""
    (folder / "reward.py").write_text(REWARD)
    return ("reward.load=null", f"reward.function={folder / 'reward.py'}")


@pytest.fixture(scope="module")
def separate(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which no role gives its memory back, in one process: test_launch.py has it equal to one on Ray."""
    folder = tmp_path_factory.mktemp("separate")
    succeed(recipe.run(folder / "run", *COMMON, *rewarded(folder), "runtime=local"))
    return folder / "run"


def without_push(run_dir: Path) -> list[dict[str, float]]:
    """A step without a pair is followed by a push where engines have slept, and by none where they have not."""
    return [{name: value for name, value in row.items() if not name.startswith("sync/")} for row in numbers(run_dir)]


def assert_equal(run_dir: Path, separate: Path) -> None:
    assert [row["pair/kept"] for row in numbers(run_dir)][1] == 0
    assert without_push(run_dir) == without_push(separate)
    for name in ("rollouts.jsonl", "samples.jsonl"):
        assert (run_dir / name).read_bytes() == (separate / name).read_bytes()
    found, expected = weights(run_dir), weights(separate)
    assert all(found[name].equal(value) for name, value in expected.items())


def test_a_colocated_run_is_the_separate_one_and_no_memory_overlaps(
    recipe: Recipe, separate: Path, tmp_path: Path
) -> None:
    command = recipe.command(tmp_path / "run", *COMMON, *SHARED, *rewarded(tmp_path))
    done, calls = recorded(command, tmp_path / "calls.jsonl", recipe.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal(tmp_path / "run", separate)
    assert_in_turn(calls, num_steps=4, empty=(1,))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {"memory/update/train", "memory/sample/infer", "memory/asleep/infer"} <= rows[-1].keys()
    assert all("sync/seconds" in row for row in rows)


@pytest.mark.slow
def test_no_rank_holds_what_an_engine_of_another_device_is_about_to_take(recipe: Recipe, tmp_path: Path) -> None:
    command = recipe.command(tmp_path / "run", *COMMON, *TWO_DEVICES, *rewarded(tmp_path))
    done, calls = recorded(command, tmp_path / "calls.jsonl", recipe.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_in_turn(calls, num_steps=4, empty=(1,), num_devices=2)


def assert_in_turn(calls: Sequence[Recorded], *, num_steps: int, empty: Sequence[int], num_devices: int = 1) -> None:
    """Each device: what the engines have and what the trainer has are there at different times, in the one order."""
    for rank in range(num_devices):
        here = [call for call in calls if call.rank == rank]
        optimizer = list(spans(here, "train", "restore", "offload", at_first=True))
        weights_awake = list(spans(here, "infer", "wake_weights", "sleep"))
        caches = list(spans(here, "infer", "wake_cache", "sleep"))
        # The first push, and one after each step; an update in each step but the empty ones.
        assert (len(weights_awake), len(caches)) == (1 + num_steps, 1 + num_steps)
        assert len(optimizer) == 1 + num_steps - len(empty)
        assert not any(overlap(mine, theirs) for mine in optimizer for theirs in (*weights_awake, *caches))
    for woken in (call for call in calls if call.method == "wake_cache"):
        before = [call for call in calls if call.method == "free_cache" and call.end <= woken.begin]
        pushes = len([call for call in calls if call.method == "wake_weights" and call.end <= woken.begin])
        assert len(before) == pushes  # as many ranks as engines: every rank has freed what it had for this push
    for push in (call for call in calls if call.method == "receive"):
        assert not any(overlap((push.begin, push.end), span) for span in optimizer)


def spans(
    calls: Sequence[Recorded], role: str, comes: str, goes: str, *, at_first: bool = False
) -> Iterator[tuple[float, float]]:
    """From when something may begin to be on the device to when it has left it for certain."""
    begin = 0.0 if at_first else None
    for call in calls:
        if (call.role, call.method) == (role, comes):
            assert begin is None, f"{comes} twice"
            begin = call.begin
        elif (call.role, call.method) == (role, goes) and begin is not None:
            yield begin, call.end
            begin = None
    if begin is not None:
        yield begin, float("inf")


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


@pytest.mark.parametrize(
    "faults",
    [
        (Fault(role="infer", method="receive", call=3), Fault(role="train", method="update", call=2)),
        (
            Fault(role="infer", method="sleep", call=3),
            Fault(role="infer", method="wake_cache", call=4, after=True),
            Fault(role="infer", method="probe", call=5),
            Fault(role="train", method="restore", call=2),
            Fault(role="train", method="send_bucket", call=4),
            Fault(role="train", method="free_cache", call=6),
        ),
    ],
    ids=["some", "many"],
)
@pytest.mark.timeout(600)
def test_workers_that_are_lost_in_their_turn_change_no_number(
    recipe: Recipe, separate: Path, tmp_path: Path, faults: tuple[Fault, ...]
) -> None:
    command = recipe.command(tmp_path / "run", *COMMON, *SHARED, "resilience.min_deadline_s=5", *rewarded(tmp_path))
    done = faulty(command, tmp_path / "plan", faults, recipe.env, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert happened(tmp_path / "plan") == len(faults), done.stderr
    assert_lost_nothing(tmp_path / "run", separate)


def assert_lost_nothing(run_dir: Path, separate: Path) -> None:
    assert without_push(run_dir) == without_push(separate)
    found, expected = weights(run_dir), weights(separate)
    assert all(found[name].equal(value) for name, value in expected.items())
