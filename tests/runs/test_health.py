"""A run that a verdict ends, saved, and that goes on when it is told to; and the page beside a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlxf.assembly.local import launch
from rlxf.checkpointing.store import list_checkpoints
from rlxf.config.load import load_config
from rlxf.core.errors import UnhealthyRun
from rlxf.observe.diary import started
from rlxf.observe.formulas import read_jsonl
from rlxf.observe.report_process import kept_page
from tests.data_world import write_rows
from tests.runs.small import ROOT, Recipe, World, run
from tests.unit.report.pages import data_of

NUM_STEPS = 20


def often(world: World, folder: Path, **more: dict[str, object]) -> Recipe:
    """Six pairs, over and over again: two thirds of them in a step."""
    pairs = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    return world.recipe(
        training={"stage": "dpo", "train_iters": NUM_STEPS},
        actor_rollout={"data_path": str(write_rows(folder / "pairs.jsonl", pairs))},
        reward={"model": None, "load": None},
        **more,
    )


def test_a_verdict_ends_a_run_saved_and_it_goes_on_without_it(world: World, tmp_path: Path) -> None:
    run_dir, stops = tmp_path / "run", often(world, tmp_path, health={"stop_on": ["data_repeated"]})
    with pytest.raises(UnhealthyRun, match="data_repeated holds since step") as ended:
        run(stops, run_dir)
    done = len(read_jsonl(run_dir / "metrics.jsonl"))
    assert 0 < done < NUM_STEPS
    assert f"saved: {done} of {NUM_STEPS} steps" in "".join(ended.value.__notes__)
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == [f"iter_{done:07d}"]
    last = read_jsonl(run_dir / "run.jsonl")[-1]
    assert (last["what"], last["step"], last["exit_code"]) == ("ended", done, 1)

    (tmp_path / "again").mkdir()
    run_dir.rename(tmp_path / "again" / "run")
    run_dir = tmp_path / "again" / "run"
    with pytest.raises(UnhealthyRun):
        run_again(stops, run_dir)
    assert len(read_jsonl(run_dir / "metrics.jsonl")) == done
    run_again(often(world, tmp_path), run_dir)
    assert len(read_jsonl(run_dir / "metrics.jsonl")) == NUM_STEPS
    verdict, *_ = json.loads((run_dir / "summary.json").read_text())["verdicts"]
    assert (verdict["name"], verdict["step"], verdict["last"]) == ("data_repeated", done, NUM_STEPS)


def run_again(recipe: Recipe, run_dir: Path) -> None:
    launch(load_config({"runtime": "local", **recipe}), run_dir)


def test_a_run_leaves_its_page(world: World, tmp_path: Path) -> None:
    log = {"report": True, "samples_interval": 1}
    done = run(world.recipe(training={"eval_interval": 1}, eval={"num_prompts": 4}, log=log), tmp_path / "run")
    (page,) = data_of(done.folder / "report.html")["runs"]
    assert page["state"]["word"] == "ended"
    assert page["pairs"]["total"] > 0


def test_the_page_of_a_run_that_was_killed_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    code = f"""
import time
from pathlib import Path
from rlxf.observe.diary import started
from rlxf.observe.report_process import kept_page

folder = Path({str(tmp_path)!r})
with kept_page(folder), started(folder, step=0, num_steps=9, recipe="mine", command=[], device="cpu"):
    print("begun", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_for_page(tmp_path, "killed")


def test_a_page_that_cannot_be_made_costs_a_line(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    done = run(world.recipe(training={"train_iters": 1}, log={"report": True}), tmp_path / "run")
    assert len(done.rows) == 1
    assert "report.html is not made" in caplog.text


def test_a_run_does_not_wait_long_for_its_last_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    monkeypatch.setattr("rlxf.observe.report_process._LAST_S", 0.0)
    with kept_page(tmp_path), started(tmp_path, step=0, num_steps=1, recipe="mine", command=[], device="cpu"):
        pass
    assert "is still being made" in caplog.text
    wait_for_page(tmp_path, "ended")


def wait_for_page(folder: Path, word: str) -> None:
    """Until the page says so of its run."""
    page, until = folder / "report.html", time.monotonic() + 60
    while not (page.exists() and data_of(page)["runs"][0]["state"]["word"] == word):
        assert time.monotonic() < until
        time.sleep(0.05)
