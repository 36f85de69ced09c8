"""The end of a worker that hangs: where its threads are, into the run folder; then SIGKILL, on whichever node it is."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .remote import answer_within
from .signs import Process

log = logging.getLogger(__name__)

STACKS_S = 5.0  # longest time that the stacks of one process may take
REMOTE_S = 20.0  # the same on another node, where a process has to start for it


class Ending:
    """Ends workers.

    Args:
        folder: where the stacks go.
        node_ids: gives Ray's id of each living node, by the name that the run gives it.
    """

    def __init__(self, folder: Path, node_ids: Callable[[], Mapping[str, str]]) -> None:
        self._folder, self._node_ids = folder, node_ids

    def end(self, handle: Any, process: Process | None, node: str, name: str) -> str:
        """Kill the process of an actor; where its stacks are, or why there are none."""
        stacks = "its process is not known" if process is None else self._take(process, node)
        try:
            ray.kill(handle)
        except RayError as error:
            log.debug("Ray does not kill %s: %s", name, error)
        if not stacks.startswith("Process "):
            return f"no stacks: {stacks}"
        try:
            return f"stacks: {self._write(name, stacks)}"
        except OSError as error:
            return f"its stacks could not be written: {error}"

    def _take(self, process: Process, node: str) -> str:
        if process.machine == Process.this().machine:
            return stacks_and_kill(process)
        node_id = self._node_ids().get(node)
        if node_id is None:
            return f"node {node} is not known"
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = ray.remote(num_cpus=0)(stacks_and_kill).options(scheduling_strategy=there, max_retries=0)
        answer = answer_within(task.remote(process), REMOTE_S)
        return f"node {node} did not answer in {REMOTE_S:g} s" if answer is None else str(answer)

    def _write(self, name: str, text: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = "_".join(name.split()[:3])  # "infer_rank_1"
        number = 1 + sum(1 for _ in self._folder.glob(f"{stem}_*.txt"))
        path = self._folder / f"{stem}_{number}.txt"
        path.write_text(text, encoding="utf-8")
        return path


def stacks_and_kill(process: Process) -> str:
    """Runs on the process's machine: the stacks of its threads, or why there are none; it and its children are gone."""
    found = process.found()
    if found is None:
        return "its process has ended"
    try:
        if found.status() == psutil.STATUS_STOPPED:
            text = "its process is stopped (SIGSTOP), and a stopped process shows none"
        else:
            text = _stacks(process.pid)
        for one in [*found.children(recursive=True), found]:
            one.kill()
    except psutil.Error as error:
        return f"{error}"
    return text


def _stacks(pid: int) -> str:
    """What py-spy says. Without pausing the process: one that is in a system call for good cannot be paused."""
    program = Path(sys.executable).with_name("py-spy")
    command = [str(program), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STACKS_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy did not answer: {error}"
    return done.stdout if done.returncode == 0 else f"py-spy failed: {' '.join(done.stderr.split())[:300]}"
