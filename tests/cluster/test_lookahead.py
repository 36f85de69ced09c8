"""Runs on Ray whose sampling is ahead of their training: the numbers of one process, however they end.

Workers wait where a test wants them (``held``), so that a signal or a loss comes while one step is sampled and another
one is trained on. The steps that a chapter of the run is made of at ``rollout.lookahead=1``: steps 1 and 2 are sampled
at the start; then each update has the sampling of the next step but one beside it.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlxf.checkpointing.store import list_checkpoints
from rlxf.checkpointing.waiting import load_waiting
from rlxf.config.kinds import Role
from tests.cluster.conftest import Recipe, end_run
from tests.cluster.faults import Fault, planned, released
from tests.cluster.test_ends import worker
from tests.cluster.test_launch import leftovers, numbers, succeed, wait_until
from tests.cluster.test_resume import weights

pytestmark = pytest.mark.cluster

STEPS = 6
COMMON = (f"training.train_iters={STEPS}", "log.tensorboard=false", "log.rollouts=true")
MOVING = ("ref.ref_update_interval=2", "training.eval_interval=4", "eval.num_prompts=4")
LORA = ("actor_rollout.lora_r=4", "actor_rollout.lora_alpha=8", "actor_rollout.lr=0.01")
ROLES: dict[str, Role] = {"generate": "infer", "update": "train", "score": "reward"}
FAULTY = {"infer": "FaultyEngine", "train": "FaultyActor", "reward": "FaultyScorer", "ref": "FaultyReference"}


def ahead(lookahead: int, *more: str) -> tuple[str, ...]:
    # A lost worker ends the run: test_recovery.py has those that are started again.
    return (*COMMON, "resilience.max_recoveries=0", f"rollout.lookahead={lookahead}", *more)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of the same recipe in one process, made once."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), dict[tuple[str, ...], Path]()

    def run(*overrides: str) -> Path:
        if overrides not in made:
            run_dir = folder / f"run{len(made)}"
            succeed(recipe.run(run_dir, *overrides, "runtime=local"))
            made[overrides] = run_dir
        return made[overrides]

    return run


def assert_same(run_dir: Path, other: Path) -> None:
    assert numbers(run_dir) == numbers(other)
    for name in ("rollouts.jsonl", "samples.jsonl", "eval.jsonl"):
        mine, theirs = run_dir / name, other / name
        assert mine.exists() == theirs.exists()
        assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), name
    mine_weights, other_weights = weights(run_dir), weights(other)
    assert mine_weights.keys() == other_weights.keys()
    assert all(mine_weights[name].equal(value) for name, value in other_weights.items())


@dataclass
class Held:
    """A run on Ray some of whose calls wait."""

    recipe: Recipe
    process: subprocess.Popen[str]
    waits: dict[str, Path]  # what each of these calls has written
    code: int = 0
    output: str = ""

    def release(self, call: str) -> None:
        released(self.waits[call]).touch()

    def kill(self, role: Role) -> None:
        worker(self.recipe, self.process, FAULTY[role]).kill()


@contextmanager
def held(recipe: Recipe, run_dir: Path, calls: tuple[str, ...], *overrides: str) -> Iterator[Held]:
    """The run, once all ``calls`` wait (``generate_4``: the engine's fourth call); afterwards how it ended."""
    folder = run_dir.with_name(f"{run_dir.name}_holds")
    methods = [call.split("_") for call in calls]
    faults = [Fault(role=ROLES[name], method=name, call=int(number), how="hold") for name, number in methods]
    process = subprocess.Popen(
        planned(recipe.command(run_dir, *overrides), folder, faults),
        env=recipe.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        run = Held(recipe, process, {call: folder / f"{number}.done" for number, call in enumerate(calls)})
        wait_until(lambda: process.poll() is not None or all(path.exists() for path in run.waits.values()), 180)
        assert process.poll() is None, process.communicate()[0]
        family = recipe.family(process)
        yield run
        run.output = process.communicate(timeout=90)[0]
        run.code = process.returncode
        assert "Traceback" not in run.output, run.output
        assert "UserWarning" not in run.output, run.output
        assert not [name for name in leftovers(family) if "Faulty" in name]
    finally:
        end_run(process)


def assert_cut(run: Held, run_dir: Path, step: int, lookahead: int) -> None:
    """Step ``step`` is the newest, and the weights before it sampled the last step that waits."""
    (newest,) = list_checkpoints(run_dir / "checkpoints")
    assert f"saved: {step} of {STEPS} steps, {newest}\n" in run.output, run.output
    assert numbers(run_dir)[-1]["step"] == step
    waiting = load_waiting(newest)
    last = step + lookahead - 1
    assert [(item.step, item.rollouts is None) for item in waiting] == [(n, n == last) for n in range(step, last + 1)]
    assert (waiting[-1].sampled_at, waiting[-1].version) == (step - 1, step - 1)
    assert list((newest / "pushed").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stop_while_a_step_is_sampled_saves_the_update_beside_it(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """The run that goes on is in one process, and samples that step again."""
    run_dir = tmp_path / "run"
    with held(recipe, run_dir, ("generate_4", "update_3"), *ahead(1)) as run:  # step 4 is sampled, step 3 trained on
        run.process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert run.process.poll() is None  # it waits for the update
        run.release("update_3")
    assert run.code == 128 + signal.SIGTERM, run.output
    assert_cut(run, run_dir, 3, 1)
    succeed(recipe.run(run_dir, *ahead(1), "runtime=local"))
    assert_same(run_dir, undisturbed(*ahead(1)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("lookahead", "more"),
    [(1, MOVING), (1, LORA), (1, ("sync.transport=object_store",)), (2, ())],
    ids=["moving", "lora", "store", "two"],
)
def test_a_lost_engine_costs_no_complete_step(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int, more: tuple[str, ...]
) -> None:
    """One of the runs that go on is on Ray, too."""
    run_dir = tmp_path / "run"
    number = lookahead + 3 + 3 * (more is MOVING)  # an evaluation before the first step samples three times
    with held(recipe, run_dir, (f"generate_{number}", "update_3"), *ahead(lookahead, *more)) as run:
        run.kill("infer")
        time.sleep(2)
        run.release("update_3")
    assert run.code == 1, run.output
    assert "lost infer rank 0" in run.output
    assert_cut(run, run_dir, 3, lookahead)
    runtime = () if lookahead == 2 else ("runtime=local",)
    succeed(recipe.run(run_dir, *ahead(lookahead, *more), *runtime))
    assert_same(run_dir, undisturbed(*ahead(lookahead, *more)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("call", "step", "waiting"),
    [
        ("generate_4", 3, [(3, False, False)]),  # the update beside it is over
        ("score_4", 3, [(3, True, False), (4, True, False)]),  # the update of step 4 waits for it; step 5 is sampled
        (
            "generate_10",
            4,
            [(4, True, True)],
        ),  # the evaluation after step 4: six steps are sampled, three calls are its
    ],
)
def test_a_stop_saves_what_is_known_of_the_steps_ahead(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, call: str, step: int, waiting: list[object]
) -> None:
    run_dir = tmp_path / "run"
    evaluates = ("training.eval_interval=4", "eval.num_prompts=4") if call == "generate_10" else ()
    with held(recipe, run_dir, (call,), *ahead(1, *evaluates)) as run:
        time.sleep(2)
        run.process.send_signal(signal.SIGTERM)
    assert run.code == 128 + signal.SIGTERM, run.output
    (newest,) = list_checkpoints(run_dir / "checkpoints")
    assert f"saved: {step} of {STEPS} steps, {newest}\n" in run.output
    found = [(item.step, item.rollouts is not None, item.raw_scores is not None) for item in load_waiting(newest)]
    assert found == waiting
    succeed(recipe.run(run_dir, *ahead(1, *evaluates), "runtime=local"))
    assert_same(run_dir, undisturbed(*ahead(1, *evaluates)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("call", ["generate_1", "score_1", "update_1"])
def test_a_stop_before_a_step_is_complete_ends_in_time(recipe: Recipe, tmp_path: Path, call: str) -> None:
    run_dir = tmp_path / "run"
    with held(recipe, run_dir, (call,), *ahead(1, "training.stop_grace_s=2")) as run:
        begin = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(60)
        assert time.monotonic() - begin < 30
    assert run.code == 128 + signal.SIGTERM, run.output
    assert list_checkpoints(run_dir / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_update_that_a_stop_cuts_saves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held(recipe, run_dir, ("generate_4", "update_3"), *ahead(1, "training.stop_grace_s=2")) as run:
        run.process.send_signal(signal.SIGTERM)
    assert run.code == 128 + signal.SIGTERM, run.output
    assert "not saved: the update of step 3 took longer than training.stop_grace_s = 2 and was stopped" in run.output
    assert list_checkpoints(run_dir / "checkpoints") == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["train", "reward", "ref"])
def test_the_first_cause_is_told_when_others_are_busy(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, role: Role
) -> None:
    """A worker is lost while the engine samples; the update is complete unless it is the trainer's."""
    run_dir = tmp_path / "run"
    calls = ("generate_4", "update_3") if role == "train" else ("score_4",)
    with held(recipe, run_dir, calls, *ahead(1, "training.save_interval=2")) as run:
        run.kill(role)
        if role == "ref":
            run.release("score_4")  # it is asked when the scores are there
    assert run.code == 1, run.output
    assert re.findall(r"lost (\w+) rank", run.output) == [role], run.output
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert newest.name == ("iter_0000002" if role == "train" else "iter_0000003")
    succeed(recipe.run(run_dir, *ahead(1), "runtime=local"))
    assert_same(run_dir, undisturbed(*ahead(1)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("lookahead", "more"), [(1, MOVING), (4, ())], ids=["one", "four"])
def test_on_ray_the_numbers_are_those_of_one_process(
    recipe: Recipe, undisturbed: Callable[..., Path], tmp_path: Path, lookahead: int, more: tuple[str, ...]
) -> None:
    succeed(recipe.run(tmp_path / "run", *ahead(lookahead, *more)))
    assert_same(tmp_path / "run", undisturbed(*ahead(lookahead, *more)))
