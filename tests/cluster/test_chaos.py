"""Three hundred steps with a fault every twenty: the run ends well, with the numbers of the run that met none.

The faults and their order are drawn from a recorded seed: workers of every role that are killed, stopped or hang, a
reward server that fails for a while, and a disk that is full for five seconds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.cluster.conftest import Recipe
from tests.cluster.faults import Fault, happened, run
from tests.cluster.test_launch import numbers, succeed
from tests.cluster.test_recovery import assert_same
from tests.http_world import Exchange, Service

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS, APART, SEEDS = 300, 20, (1, 2, 3)
PLACES = (
    ("infer", "generate"), ("infer", "receive"), ("infer", "end_update"), ("ref", "logps"),
    ("reward", "score"), ("train", "update"), ("train", "send_bucket"), ("train", "save_checkpoint"),
)  # fmt: skip
COMMON = (
    *(f"training.train_iters={STEPS}", "training.save_interval=5", "training.keep_latest=3", "log.rollouts=true"),
    *("resilience.min_deadline_s=5", "resilience.max_recoveries=20", "log.tensorboard=false"),
)


def drawn(seed: int) -> list[Fault]:
    """One fault every ``APART`` steps; every place at least once."""
    draw = random.Random(seed)
    places = [*PLACES, *draw.choices(PLACES, k=STEPS // APART - 2 - len(PLACES))]
    draw.shuffle(places)
    return [
        Fault(role=role, method=method, rows=APART * (number + 1), how=draw.choice(("kill", "kill", "stop", "hang")))
        for number, (role, method) in enumerate(places)
    ]


@contextmanager
def scoring() -> Iterator[tuple[Service, threading.Event]]:
    """A reward server, and the event that makes it fail."""
    down = threading.Event()

    def answer(exchange: Exchange) -> None:
        if down.is_set():
            exchange.reply(503, "starting")
        else:
            exchange.json({"scores": [float(len(text) % 5) for text in exchange.body["completions"]]})

    with Service(answer) as service:
        yield service, down


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own, which can be filled."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, seconds: float) -> None:
    """No room for anything, for so long."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"\0" * 2**16)
        except OSError:
            pass
        time.sleep(seconds)
    filler.unlink()


def once_there(metrics: Path, rows: int, then: Callable[[], None]) -> threading.Thread:
    """Do something when so many steps are complete."""

    def watch() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < rows:
            time.sleep(0.1)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with scoring() as (service, _):
        succeed(recipe.run(run_dir, *COMMON, *_rewards(recipe, service), "runtime=local"))
    return run_dir


def _rewards(recipe: Recipe, service: Service) -> tuple[str, ...]:
    model = f"{{name: model, load: {recipe.folder / 'reward'}, weight: 1}}"
    server = f"{{name: server, url: '{service.url}', weight: 0.5, tries: 12}}"
    return ("reward.load=null", "reward.model=null", f"reward.sources=[{model},{server}]")


@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a file system of its own takes root")
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(recipe: Recipe, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    faults, disk = drawn(seed), tmp_path / "disk"
    with ExitStack() as stack:
        service, down = stack.enter_context(scoring())
        stack.enter_context(small_disk(disk))
        run_dir = disk / "run"
        metrics = run_dir / "metrics.jsonl"

        def fail_for_a_while() -> None:
            down.set()
            time.sleep(3)
            down.clear()

        once_there(metrics, STEPS - 10, lambda: fill(disk, 5.0))
        once_there(metrics, STEPS - APART - 5, fail_for_a_while)
        command = recipe.command(run_dir, *COMMON, *_rewards(recipe, service), "rollout.lookahead=0")
        done = run(command, tmp_path / "plan", faults, recipe.env, timeout_s=1100)
        assert done.returncode == 0, f"{[asdict(fault) for fault in faults]}\n{done.stderr}"
        assert happened(tmp_path / "plan") == len(faults) >= 10
        rows = read_jsonl(run_dir / "events.jsonl")
        assert len([row for row in rows if row["event"] in ("recovered", "rebuilt")]) >= len(faults)
        assert_same(run_dir, undisturbed)
        assert len(numbers(run_dir)) == STEPS
