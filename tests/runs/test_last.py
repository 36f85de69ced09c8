"""``training.resume=last``: the newest unfinished run of the same recipe, and no other."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlxf.checkpointing.store import list_checkpoints, step_of
from rlxf.checkpointing.unfinished import newest_unfinished
from rlxf.config.load import load_config
from rlxf.config.schema import RunConfig
from rlxf.core.command import Typed
from tests.runs.killed import Call, Raise, run_in_child
from tests.runs.small import ROOT, Finished, Recipe, World, environment

STEPS = 4
TYPED = Typed("small", ("--config-name", "small"))
FAULT = Raise("rlxf.rollout.hf:HfEngine.generate", "rlxf.core.errors:WorkerLost", number=3)


@pytest.fixture(scope="module")
def recipe(world: World) -> Recipe:
    return world.recipe(training={"train_iters": STEPS}, log={"rollouts": True, "samples_interval": 2})


@pytest.fixture(scope="module")
def stopped(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that failed in its third step."""
    folder = tmp_path_factory.mktemp("small") / "first"
    ended = run_in_child(recipe, folder, FAULT)
    assert "to go on: python ray_gpt.py" in ended.output
    return folder


def load(recipe: Recipe, **changes: Any) -> RunConfig:
    changed = {section: {**recipe[section], **changes.get(section, {})} for section in recipe}
    return load_config({"runtime": "local", **changed})


def found(recipe: Recipe, run_dir: Path, typed: Typed | None = TYPED, **changes: Any) -> Path | None:
    unfinished = newest_unfinished(load(recipe, **changes), run_dir, typed)
    return unfinished.folder if unfinished else None


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    """Two such runs beside each other; the second was written to last."""
    for number, name in enumerate(("one", "two"), 1):
        shutil.copytree(stopped, tmp_path / name)
        newest = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        os.utime(newest, (number, number))
    return tmp_path


def test_the_newest_of_two_is_taken(recipe: Recipe, copied: Path) -> None:
    assert found(recipe, copied / "new") == copied / "two"
    os.utime(list_checkpoints(copied / "one" / "checkpoints")[-1])
    assert found(recipe, copied / "new") == copied / "one"


def test_one_that_is_complete_or_still_runs_is_left_alone(recipe: Recipe, copied: Path) -> None:
    (copied / "two" / "summary.json").write_text(json.dumps({"steps": STEPS}))
    assert found(recipe, copied / "new") == copied / "one"
    with (copied / "one" / "checkpoints" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found(recipe, copied / "new") is None
    assert found(recipe, copied / "new") == copied / "one"


def test_a_run_of_another_recipe_is_left_alone(recipe: Recipe, copied: Path, tmp_path: Path) -> None:
    assert found(recipe, copied / "new", actor_rollout={"lr": 2e-3}) is None
    assert found(recipe, copied / "new", training={"seed": 6}) is None
    assert found(recipe, copied / "new", training={"save_interval": 1}) == copied / "two"  # changes no number
    assert found(recipe, copied / "new", Typed("other", ())) is None
    data = tmp_path / "others.jsonl"
    rows = Path(recipe["actor_rollout"]["data_path"]).read_text()
    data.write_text(rows)
    assert found(recipe, copied / "new", actor_rollout={"data_path": str(data)}) == copied / "two"  # the same content
    data.write_text(rows.replace("say", "tell"))
    assert found(recipe, copied / "new", actor_rollout={"data_path": str(data)}) is None


def test_the_run_in_the_folder_itself_counts_and_one_without_a_checkpoint_does_not(
    recipe: Recipe, stopped: Path, tmp_path: Path
) -> None:
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert found(recipe, tmp_path / "new") is None
    assert found(recipe, tmp_path / "nowhere" / "new") is None
    assert found(recipe, stopped) == stopped


def test_a_folder_of_the_first_version_is_known_by_its_name(recipe: Recipe, stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small" / "2026-11-21_10-00-00"
    shutil.copytree(stopped, folder)
    (folder / "command.json").unlink()
    assert found(recipe, folder.with_name("new")) == folder
    assert found(recipe, folder.with_name("new"), Typed("other", ())) is None


def test_checkpoints_in_a_folder_of_their_own_lead_to_the_run_that_wrote_them(recipe: Recipe, tmp_path: Path) -> None:
    own = {**recipe, "actor_rollout": {**recipe["actor_rollout"], "save": str(tmp_path / "ckpt")}}
    (tmp_path / "runs").mkdir()
    run_in_child(own, tmp_path / "runs" / "first", FAULT)
    assert found(own, tmp_path / "elsewhere" / "new") == tmp_path / "runs" / "first"


def command(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--config-dir", str(folder), "--config-name", "small", "runtime=local", *overrides]
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_gpt.py"), *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_the_printed_commands_go_on_in_a_folder_with_a_space(recipe: Recipe, tmp_path: Path) -> None:
    import yaml

    folder = tmp_path / "a folder"
    folder.mkdir()
    text = yaml.safe_dump({"defaults": ["rlxf_schema", "_self_"], **recipe}, sort_keys=False)
    (folder / "small.yaml").write_text(text)
    poisoned = folder / "reward.py"
    poisoned.write_text(
        "import os\ncalls = 0\n\ndef reward(prompts, completions, completion_ids, **columns):\n"
        "    global calls\n    calls += 1\n    assert calls < 3 or not os.path.exists('down')\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    (folder / "down").touch()
    rule = (f"reward.function='{poisoned}'", "reward.load=null", "reward.model=null")
    first = command(folder, *rule, f"hydra.run.dir='{folder}/my runs/first'")
    assert first.returncode != 0
    go_on = re.search(r"^to go on: (.*)$", first.stderr, re.M)
    assert go_on, first.stderr
    python, script, *arguments = shlex.split(go_on[1])
    assert (python, script) == ("python", str(ROOT / "ray_gpt.py"))  # typed in another folder
    (folder / "down").unlink()
    # A new run beside it tells of it, with the other command.
    beside = command(folder, *rule, f"hydra.run.dir='{folder}/my runs/second'")
    assert beside.returncode == 0, beside.stderr
    assert "an unfinished run of this recipe" in beside.stderr
    assert f"(2 of {STEPS} steps)" in beside.stderr
    last = re.search(r"to continue it: (.*)$", beside.stderr, re.M)
    assert last
    assert last[1].endswith("training.resume=last")
    ended = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "resumed from" in ended.stderr
    assert [row["step"] for row in Finished(folder / "my runs" / "first").rows] == [1, 2, 3, 4]


def test_last_goes_on_in_the_folder_that_it_found_and_says_when_there_is_none(recipe: Recipe, tmp_path: Path) -> None:
    last = {**recipe, "training": {**recipe["training"], "resume": "last"}}
    anew = run_in_child(last, tmp_path / "first", Call("rlxf.rollout.hf:HfEngine.generate", 3, signal=signal.SIGTERM))
    assert "no unfinished run of this recipe" in anew.output
    assert anew.code == 128 + signal.SIGTERM
    ended = run_in_child(last, tmp_path / "second")
    assert ended.code == 0, ended.output
    assert f"continuing the run in {tmp_path / 'first'}" in ended.output
    assert not (tmp_path / "second").exists()
    assert step_of(list_checkpoints(tmp_path / "first" / "checkpoints")[-1]) == STEPS
