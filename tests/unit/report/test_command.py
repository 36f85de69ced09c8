"""The command: one page once, or a process beside a run that ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.made_run import Made, make_run
from rlxf.report import make
from rlxf.report.command import main
from rlxf.report.make import Page
from tests.unit.report.pages import data_of

ROOT = Path(__file__).parents[3]


def test_one_run_gets_its_page_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, Made(steps=4))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert f"{tmp_path}/report.html: 0." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_several_runs_get_one_page_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(make_run(tmp_path / name, Made(steps=4))) for name in "abc"]
    monkeypatch.chdir(tmp_path)
    assert main(folders) == 0
    assert (tmp_path / "report.html").exists()
    assert capsys.readouterr().out.startswith("report.html: ")
    assert main([*folders, "--output", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", Made(steps=4))
    assert main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/gone: does not exist; expected the folder of a run, such as outputs/RECIPE/DATE_TIME\n"
    )
    assert main([str(tmp_path / "run"), "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    for wrong in (["a", "b", "--follow"], ["a", "--interval", "0"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_the_script_works_from_anywhere(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=4))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    make_run(tmp_path, Made(steps=20, num_steps=40, ends=False))
    command = [sys.executable, "-m", "rlxf.report", "--follow", "--interval", "0.05", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            pipe.close()


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def state_on(page: Path) -> str:
    word: str = data_of(page)["runs"][0]["state"]["word"]
    return word


def test_a_follower_renews_the_page_and_ends_after_the_run(tmp_path: Path, follower: subprocess.Popen[bytes]) -> None:
    page = tmp_path / "report.html"
    wait_for(page.exists)
    assert state_on(page) == "running"
    assert psutil.Process(follower.pid).nice() == 19
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group when a run is stopped
        follower.send_signal(number)
    first = page.stat().st_ino
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.5}\n')
    wait_for(lambda: page.stat().st_ino != first)
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"what": "ended", "step": 21, "exit_code": 0, "message": ""}\n')
    assert follower.stdin is not None
    follower.stdin.close()
    assert follower.wait(timeout=120) == 0
    assert state_on(page) == "ended"


def test_a_follower_of_a_killed_run_says_so(tmp_path: Path, follower: subprocess.Popen[bytes]) -> None:
    page = tmp_path / "report.html"
    wait_for(page.exists)
    assert follower.stdin is not None
    follower.stdin.close()  # what the system does when the run is killed
    assert follower.wait(timeout=120) == 0
    assert state_on(page) == "killed"


def test_a_follower_of_a_deleted_run_leaves_nothing(tmp_path: Path, follower: subprocess.Popen[bytes]) -> None:
    wait_for((tmp_path / "report.html").exists)
    shutil.rmtree(tmp_path)
    assert follower.wait(timeout=120) == 0
    assert not tmp_path.exists()


def test_a_follower_tries_again_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, Made(steps=4, ends=False))
    page = Page([tmp_path], tmp_path / "report.html")
    tries: list[bool] = []
    told: list[str] = []
    reading, writing = os.pipe()

    def full_at_first(path: Path, text: str) -> None:
        tries.append(True)
        if len(tries) < 3:
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text)
        if len(tries) == 3:
            os.close(writing)  # the run has ended

    monkeypatch.setattr(make, "write_text", full_at_first)
    monkeypatch.setattr(make, "SHARE", 1.0)
    with open(reading, "rb", buffering=0) as pipe:
        make.follow(page, tmp_path, pipe, interval_s=0.01, warn=told.append)
    assert len(tries) == 4, "three while the run went on, and the last page"
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert (tmp_path / "report.html").exists()


def test_a_follower_takes_at_most_one_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, Made(steps=4, ends=False))
    page = Page([tmp_path], tmp_path / "report.html")
    pauses: list[float] = []

    def closed(_: object, seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) > 1

    monkeypatch.setattr(make, "_closed", closed)
    seconds = iter([10.0, 10.7])
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    with open(os.devnull, "rb") as nothing:
        make.follow(page, tmp_path, nothing)
    assert pauses == [0.0, pytest.approx(70.0)]
