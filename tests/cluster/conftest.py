"""Real Ray on this machine's CPUs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from tests.cluster.network import Cable
from tests.cluster.nursery import Nursery, nursery
from tests.ports import free_port
from tests.runs.killed import typed_in_child
from tests.tiny_models import config as model_config
from tests.tiny_models import save_causal_lm, save_reward_model

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Recipe:
    """A recipe folder for small random models; the HF engine, because it starts in a second.

    Its runs start Ray by themselves, or go to the cluster of ``env``.
    """

    folder: Path
    env: dict[str, str] = field(default_factory=lambda: environment())
    nursery: Nursery | None = None  # forks the drivers, and the cluster's workers

    @property
    def offline(self) -> tuple[str, ...]:
        """Overrides for an offline run: two processes instead of four."""
        pairs = f"actor_rollout.data_path={self.folder / 'pairs.jsonl'}"
        return ("training.stage=dpo", pairs, "reward.load=null", "resource_pool.actor_rollout=1")

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        options = ["--config-dir", str(self.folder), "--config-name", "small", f"hydra.run.dir={run_dir}"]
        return [self.python, str(ROOT / "ray_gpt.py"), *options, *overrides]

    @property
    def python(self) -> str:
        return str(self.nursery.python) if self.nursery else sys.executable

    def family(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        """All processes of a run but the one that was called: of its workers, and of a Ray that it has started."""
        return [*children(process.pid), *(self.nursery.forked() if self.nursery else ())]

    def run(
        self, run_dir: Path, *overrides: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(run_dir, *overrides)
        if "runtime=local" in overrides:  # what runs on Ray is compared with: nobody asks how it started
            done = typed_in_child(command[2:], timeout_s=240)
            return subprocess.CompletedProcess(command, done.code, stdout="", stderr=done.output)
        return subprocess.run(command, env=env or self.env, capture_output=True, text=True, timeout=240)


def environment(**changes: str) -> dict[str, str]:
    """Of a run that finds no cluster by itself."""
    fixed = {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **fixed, "RAY_prestart_worker_first_driver": "0", **changes}


def shape() -> dict[str, Any]:
    model = model_config()
    return {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "untie_embeddings_and_output_weights": True,
    }


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Each run starts Ray by itself."""
    return make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def recipe(alone: Recipe, standing: Cluster) -> Recipe:
    """Runs on a cluster that stands already."""
    return standing.runs(alone)


def make_recipe(folder: Path) -> Recipe:
    """Models, data and the recipe ``small`` in a folder."""
    policy = save_causal_lm(folder / "policy", seed=3)
    reward = save_reward_model(folder / "reward", seed=4)
    rows = [f'{{"prompt": "say {word}", "number": {i}}}' for i, word in enumerate(("one", "two", "three", "four"))]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    pairs = [
        f'{{"prompt": "say {word}", "chosen": "{word}", "rejected": "no"}}' for word in ("one", "two", "three", "four")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    content = {
        "defaults": ["rlxf_schema", "_self_"],
        "model": {"small": shape()},
        "training": {
            "stage": "ray_online_dpo", "device": "cpu", "global_batch_size": 4, "train_iters": 3,
            "seq_length": 48, "stage_timeout_s": 120, "start_timeout_s": 200,
        },
        "actor_rollout": {
            "model": "small", "load": str(policy), "data_path": str(folder / "prompts.jsonl"),
            "max_prompt_length": 16, "max_new_tokens": 12, "ppo_mini_batch_size": 4, "micro_batch_size": 4, "lr": 1e-3,
        },
        "ref": {"model": "small", "load": str(policy)},
        "reward": {"model": "small", "load": str(reward)},
        "rollout": {"engine": "hf"},
        "log": {"tensorboard": False, "report": False},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return Recipe(folder)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Cluster:
    """A cluster of raylets, each with two fake NPUs."""

    address: str
    dashboard: str
    env: dict[str, str]
    scratch: Path
    processes: list[subprocess.Popen[bytes]]  # `ray start` of each node
    cable: Cable | None = None  # all nodes but the first are at its other end
    nursery: Nursery | None = None  # forks the workers; None: they start by themselves

    def runs(self, recipe: Recipe) -> Recipe:
        """The recipe, whose runs are on this cluster."""
        return replace(recipe, env=self.env, nursery=self.nursery)

    def start_node(self, *, head: str | None = None) -> None:
        """Another node; ``head``: the first one, with this line."""
        line = f"{head} --port {self.address.rpartition(':')[2]}" if head else f"start --address={self.address}"
        if self.cable:
            line += f" --node-ip-address={self.cable.here if head else self.cable.there}"
        # --block: in the foreground, so that these processes are ours to end.
        # Another Ray cluster on this machine may have the agents' usual port; without its own, no job starts.
        agent = f"--dashboard-agent-listen-port={free_port()}"
        command = [*ray_program(self.scratch, self.nursery), *line.split(), agent, '--resources={"NPU": 2}', "--block"]
        if self.cable and not head:
            command = self.cable.command_there(command)
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        with (self.scratch / f"node{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)

    def lose_node(self, number: int) -> None:
        """A node that dies: its raylet is killed, and its workers end with it."""
        for child in children(self.processes[number].pid):
            if "raylet/raylet" in command_of(child):
                child.kill()

    def wait_for(self, count: int) -> None:
        """Until so many nodes are there."""
        wait_for_nodes(self.address, self.env, count)


@contextmanager
def cluster(
    *,
    with_dashboard: bool,
    nodes: int = 2,
    num_cpus: int | None = None,
    cable: Cable | None = None,
    forks: bool = False,
    **settings: str,
) -> Iterator[Cluster]:
    """Nodes, brought up with the two `ray start` lines of the user guide; ports and count are this machine's.

    With a home folder of its own, as on a machine where Ray never ran: there is no token yet.

    Args:
        with_dashboard: with the processes that jobs need.
        nodes: one or two.
        num_cpus: of the first node; default as many as there are.
        cable: the second node is at its other end.
        forks: workers are forked (``nursery.py``), which saves five of the six CPU seconds of their start.
        settings: environment of the nodes.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlxf"))  # Ray's socket paths must be short
        port, dashboard = free_port(), free_port()
        address = f"{cable.here if cable else '127.0.0.1'}:{port}"
        env = environment(HOME=scratch, RAY_ADDRESS=address, RAY_worker_niceness="0", **settings)
        forking = stack.enter_context(nursery(Path(scratch), env, plain_python(Path(scratch)))) if forks else None
        found = Cluster(address, f"http://127.0.0.1:{dashboard}", env, Path(scratch), [], cable, forking)
        head = f"start --head --dashboard-host=0.0.0.0 --dashboard-port={dashboard}"
        if not with_dashboard:  # ten processes that only jobs need
            head += " --include-dashboard=false"
        if num_cpus is not None:
            head += f" --num-cpus={num_cpus}"
        try:
            found.start_node(head=f"{head} --temp-dir={scratch}/ray")
            found.wait_for(1)
            if nodes == 2:
                found.start_node()
                found.wait_for(2)
            yield found
        finally:
            below = [child for process in found.processes for child in children(process.pid)]
            for process in reversed(found.processes):
                process.send_signal(signal.SIGTERM)
            end([psutil.Process(process.pid) for process in found.processes if process.poll() is None] + below)


@pytest.fixture(scope="session")
def two_nodes(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of two nodes that every test leaves as it was."""
    with_jobs = any("ray_job" in item.name for item in request.session.items)
    with cluster(with_dashboard=with_jobs, forks=True) as found:
        yield found


@pytest.fixture(scope="session")
def standing() -> Iterator[Cluster]:
    """One node that every test leaves as it was. A node of its own for each run costs seconds of both cores."""
    with cluster(with_dashboard=False, nodes=1, num_cpus=16, forks=True) as found:
        yield found


def ray_program(scratch: Path, forks: Nursery | None = None) -> list[str]:
    """`ray`, by a path without spaces, as scripts/cluster_up.sh calls it; ``forks``: forks its workers."""
    python = plain_python(scratch)
    if forks:  # Ray starts Python processes by the name of its own
        lines = f"import sys; sys.executable = {str(forks.python)!r}; from ray.scripts.scripts import main; main()"
        return [str(python), "-c", lines]
    return [str(python), str(python.with_name("ray"))]


def plain_python(scratch: Path) -> Path:
    """This interpreter, by a path without spaces: Ray's own shell lines do not quote it."""
    if shlex.quote(sys.executable) == sys.executable:
        return Path(sys.executable)
    environment = scratch / "environment"
    if not environment.is_symlink():  # the second node
        environment.symlink_to(sys.prefix)
    return environment / "bin" / "python"


def wait_for_nodes(address: str, env: dict[str, str], count: int) -> None:
    program = (
        "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        asked = subprocess.run(
            [sys.executable, "-c", program, address], env=env, capture_output=True, text=True, timeout=90
        )
        if asked.returncode == 0 and int(asked.stdout.split()[-1]) >= count:
            return
        time.sleep(0.5)
    pytest.fail(f"no {count} nodes at {address}")


def children(pid: int) -> list[psutil.Process]:
    """Every process below one."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> str:
    """Its command line; empty once it has ended, which may happen at any moment."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie is one, too
        return ""


def end(processes: list[psutil.Process]) -> None:
    """Wait for processes to go; kill what does not."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        with suppress(psutil.NoSuchProcess):  # it went with the one before
            process.kill()


def end_run(process: subprocess.Popen[str]) -> None:
    """Kill a run that has not ended, and what it has started."""
    if process.poll() is None:
        family = children(process.pid)
        process.kill()
        end(family)
