"""The wheel in an environment of its own, used from a folder that has nothing to do with the checkout."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.config.recipes import NAMES
from tests.unit.tools.tiny.test_assets import SHAPE, SMALL
from tests.wheel import ROOT, build_wheel, environment, install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Call = Callable[..., subprocess.CompletedProcess[str]]

TRAIN = (
    *("train", "--config-name", "online_dpo_trainer_tiny", "rollout.engine=hf", *SHAPE),
    *("training.train_iters=2", "training.eval_interval=2", "training.global_batch_size=8"),
    *("actor_rollout.ppo_mini_batch_size=8", "actor_rollout.micro_batch_size=8", "eval.num_prompts=8"),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    return install(build_wheel(folder / "build"), folder / "environment")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """A folder with a small tiny world, which the installed package has built."""
    folder = tmp_path_factory.mktemp("elsewhere")
    lines = (
        "from pathlib import Path",
        "from rlxf.tools.tiny.assets import ensure",
        "from rlxf.tools.tiny.recipe import Recipe",
        f"ensure(Path('models/tiny'), {SMALL!r})",
    )
    call(programs / "python", "-P", "-c", "\n".join(lines), folder=folder)
    return folder


def call(program: Path, *arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(program), *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_nothing_comes_from_the_checkout(programs: Path, tmp_path: Path) -> None:
    code = "import sys, rlxf, rlxf_workers.launch as l; print(rlxf.__file__, l.__file__, *sys.path, sep='\\n')"
    rlxf, launcher, *path = call(programs / "python", "-c", code, folder=tmp_path).stdout.splitlines()
    assert Path(rlxf).is_relative_to(programs.parent)
    assert Path(launcher).is_relative_to(programs.parent)
    assert str(ROOT) not in path
    call(programs / "python", "-c", "import workers", folder=tmp_path, code=1)


def test_the_command_says_what_it_can_do(programs: Path, tmp_path: Path) -> None:
    assert "rlxf train --config-name" in call(programs / "rlxf", "--help", folder=tmp_path).stdout
    assert re.fullmatch(r"rlxf \d+\.\d+\.\d+\n", call(programs / "rlxf", "--version", folder=tmp_path).stdout)
    wrong = call(programs / "rlxf", "trian", folder=tmp_path, code=2)
    assert wrong.stderr.startswith("expected train or tiny after rlxf, got trian\n")


def test_recipes_are_found(programs: Path, tmp_path: Path) -> None:
    listed = call(programs / "rlxf", "train", folder=tmp_path, code=2).stderr
    assert [name for name in NAMES if name not in listed] == []
    plan = call(
        *(programs / "rlxf", "train", "--config-name", "online_dpo_trainer_llama3_8b", "dry_run=true"), folder=tmp_path
    )
    assert "2 machines" in plan.stdout
    (tmp_path / "mine.yaml").write_text("defaults: [online_dpo_trainer_tiny, _self_]\ntraining: {seed: 5}\n")
    own = ("train", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job")
    assert "seed: 5" in call(programs / "rlxf", *own, folder=tmp_path).stdout
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=pytest.mark.cluster)])
def test_the_tiny_world_trains(programs: Path, here: Path, runtime: str) -> None:
    run = here / "outputs" / "online_dpo_trainer_tiny" / runtime
    typed = (*TRAIN, f"runtime={runtime}", f"hydra.run.dir={run.relative_to(here)}")
    done = call(programs / "rlxf", *typed, folder=here)
    assert "step 2/2" in done.stdout + done.stderr
    assert (run / "policy" / "model.safetensors").is_file()
    assert json.loads((run / "command.json").read_text())["command"] == shlex.join(["rlxf", *typed])
    assert "eval/positive" in json.loads((run / "summary.json").read_text())["end"]  # the module `eval.metrics` names


def test_a_stopped_run_names_the_command_that_goes_on(programs: Path, here: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "calls = []\n\ndef reward(prompts, **columns):\n    calls.append(1)\n"
        "    assert len(calls) == 1, 'down'\n    return [float(i) for i in range(len(prompts))]\n"
    )
    rule = (
        f"reward.function={reward}",
        "reward.load=null",
        "reward.model=null",
        "runtime=local",
        "training.eval_interval=0",
    )
    failed = call(programs / "rlxf", *TRAIN, *rule, "hydra.run.dir=stopped", folder=here, code=1)
    assert f"to go on: {shlex.join(['rlxf', *TRAIN, *rule, 'hydra.run.dir=stopped'])}" in failed.stderr.splitlines()
