"""A cluster with token authentication: who has the token gets in, without any setting; nobody else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import RAY, children, end, ray_program, wait_for_nodes
from tests.ports import free_port

pytestmark = pytest.mark.cluster
JOIN = """
import sys
from workers.cluster import connect, join
from rlxf.core.errors import PlacementError
try:
    context = join(sys.argv[1])
except PlacementError as error:
    sys.exit(f"refused: {error}")
from workers.pools import cluster_nodes
print(cluster_nodes()[0].free["CPU"], context.address_info["session_dir"])
"""


@dataclass(frozen=True)
class Guarded:
    address: str
    home: Path  # holds the token


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:  # Ray's socket paths must be short
        home = Path(scratch)
        env = plain(HOME=scratch) | {"RAY_AUTH_MODE": "token"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=120)
        port = free_port()
        command = [
            *ray_program(home),
            "start",
            "--head",
            f"--port={port}",
            "--include-dashboard=false",
            "--num-cpus=3",
            "--block",
        ]
        command += [f"--temp-dir={scratch}/ray", f"--dashboard-agent-listen-port={free_port()}"]
        with (home / "log").open("wb") as log:
            head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_nodes(f"127.0.0.1:{port}", env, 1)
            yield Guarded(f"127.0.0.1:{port}", home)
        finally:
            below = children(head.pid)
            head.send_signal(signal.SIGTERM)
            end(([psutil.Process(head.pid)] if head.poll() is None else []) + below)


def plain(**more: str) -> dict[str, str]:
    """An environment that says nothing about Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more


def join(address: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOIN, address], env=plain(**env), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "place", ["home", *(pytest.param(place, marks=pytest.mark.slow) for place in ("path", "value"))]
)
def test_the_users_token_is_shown_to_the_cluster(guarded: Guarded, tmp_path: Path, place: str) -> None:
    token = guarded.home / ".ray" / "auth_token"
    env = {
        "home": {"HOME": str(guarded.home)},
        "path": {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(token)},
        "value": {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": token.read_text()},
    }[place]
    done = join(guarded.address, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3.0", next(str(path) for path in (guarded.home / "ray").glob("session_2*"))]


@pytest.mark.parametrize("token", [None, pytest.param("0" * 64, marks=pytest.mark.slow)])
def test_nobody_else_gets_in(guarded: Guarded, tmp_path: Path, token: str | None) -> None:
    wrong = tmp_path / "wrong"
    if token is not None:
        wrong.write_text(token)
    done = join(guarded.address, HOME=str(tmp_path), **({"RAY_AUTH_TOKEN_PATH": str(wrong)} if token else {}))
    assert done.returncode == 1
    assert "refused: the Ray cluster at 127.0.0.1" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
