"""``scripts/cluster_up.sh``: what it starts, what it refuses, and from which folders it works."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.test_scripts import CLUSTER_UP, run


def printed(*arguments: str) -> str:
    result = run(CLUSTER_UP, *arguments, "--print")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_head_keeps_its_dashboard_on_loopback_unless_told() -> None:
    assert "--dashboard-host=127.0.0.1" in printed("head")
    assert "--dashboard-host=0.0.0.0" in printed("head", "--expose-dashboard")


def test_ports_and_resources_reach_ray() -> None:
    line = printed("head", "--port", "7001", "--dashboard-port=7002", "--resources", '{"NPU": 8}')
    assert "--head" in line
    assert "--port=7001" in line
    assert "--dashboard-port=7002" in line
    assert r"--resources=\{\"NPU\":\ 8\}" in line


def test_worker_joins_the_address_and_hands_further_arguments_on() -> None:
    line = run(CLUSTER_UP, "worker", "--address", "10.0.0.1:6344", "--print", "--", "--num-cpus=4").stdout
    assert "--address=10.0.0.1:6344" in line
    assert line.rstrip().endswith("--num-cpus=4")
    assert "--head" not in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "head or worker"),
        (["boss"], "head or worker"),
        (["worker"], "--address"),
        (["head", "--address", "10.0.0.1:6344"], "for workers"),
        (["head", "--port", "80"], "not a port"),
        (["head", "--port", "6344; touch x"], "not a port"),
        (["head", "--dashboard-port", "18265"], "range of Ray's worker processes"),
        (["head", "--port", "6351"], "--base-port"),
        (["head", "--resources", "NPU=8"], "JSON object"),
        (["head", "--resources", '{"NPU": "8"}'], "JSON object"),
        (["head", "--frobnicate", "1"], "unknown argument"),
        (["head", "--port"], "needs a value"),
        (["wait", "--nodes", "2"], "--address"),
        (["wait", "--address", "10.0.0.1", "--nodes", "2"], "HEAD_IP:PORT"),
        (["wait", "--address", "10.0.0.1:6344"], "--nodes N"),
        (["wait", "--address", "10.0.0.1:6344", "--nodes", "2", "--timeout", "x"], "--timeout x"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(CLUSTER_UP, *arguments, cwd=tmp_path, HOME=str(tmp_path))
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # neither a token nor a file of an injected command


def test_worker_without_a_token_is_refused(tmp_path: Path) -> None:
    result = run(CLUSTER_UP, "worker", "--address", "10.0.0.1:6344", HOME=str(tmp_path), RAY_AUTH_TOKEN_PATH="")
    assert result.returncode == 2
    assert "there is no token" in result.stderr
    assert "scp" in result.stderr


def test_switching_authentication_off_is_refused(tmp_path: Path) -> None:
    result = run(CLUSTER_UP, "head", HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
    assert result.returncode == 2
    assert "open the cluster to everybody" in result.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    """A checkout with a space in its path, whose environment holds stand-ins for Ray and its interpreter."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(CLUSTER_UP, folder / "scripts")
    for name, text in (("ray", "ray, version 2.56.0"), ("python", "$0 $1 $2")):
        (folder / ".venv" / "bin" / name).write_text(f'#!/bin/sh\necho "{text}"\n')
        (folder / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("secret")
    return folder


@pytest.mark.parametrize("arguments", [["head"], ["worker", "--address", "10.0.0.1:6344"]])
def test_from_a_folder_with_a_space_ray_starts_by_a_path_without_one(arguments: list[str], spaced: Path) -> None:
    """Ray starts workers of jobs, and its client server, through a shell line in which the interpreter is unquoted."""
    script, home = spaced / "scripts" / "cluster_up.sh", spaced.parent / "home"
    for _ in range(2):  # the link of the first time is in the way of nothing
        result = run(script, *arguments, HOME=str(home), RAY_AUTH_TOKEN_PATH="")
        assert result.returncode == 0, result.stderr
        python, ray, start = result.stdout.split()[-3:]
        assert start == "start"
        for path, name in ((python, "python"), (ray, "ray")):
            assert Path(path).resolve() == spaced.resolve() / ".venv" / "bin" / name
    moved = run(script, *arguments, HOME=str(spaced), RAY_AUTH_TOKEN_PATH=str(home / ".ray" / "auth_token"))
    assert moved.returncode == 2
    assert "spaces in the path" in moved.stderr
    assert "set HOME" in moved.stderr


# Waiting for nodes.


def test_waiting_for_a_head_that_does_not_answer_ends_with_75(spaced: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    arguments = ("wait", "--address", address, "--nodes", "1", "--timeout", "1")
    home = str(spaced.parent / "home")
    result = run(spaced / "scripts" / "cluster_up.sh", *arguments, HOME=home, RAY_AUTH_TOKEN_PATH="")
    assert result.returncode == 75
    assert f"nothing answers at {address} after 1 s" in result.stderr


COUNTS = """
import time
started = time.monotonic()
def init(address, **options):
    print(address)
def nodes():
    return [{"Alive": False}, {"Alive": True}] + [{"Alive": True}] * (time.monotonic() > started + LATE)
"""


@pytest.mark.parametrize(("late", "timeout", "code"), [(0.5, "60", 0), (60, "1", 75)])
def test_waiting_ends_when_all_nodes_have_joined(
    late: float, timeout: str, code: int, tmp_path: Path, spaced: Path
) -> None:
    """A node that has died does not count."""
    (tmp_path / "ray.py").write_text(COUNTS.replace("LATE", str(late)))
    python = spaced / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{sys.executable}" "$@"\n')
    script, home = spaced / "scripts" / "cluster_up.sh", str(spaced.parent / "home")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        arguments = ("wait", "--address", address, "--nodes", "2", "--timeout", timeout)
        result = run(script, *arguments, HOME=home, RAY_AUTH_TOKEN_PATH="")
    assert result.returncode == code, result.stderr
    assert result.stdout == f"{address}\n"
    assert ("1 of 2 nodes have joined" in result.stderr) == (code == 75)
