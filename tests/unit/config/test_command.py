"""The command line as people type it: showing, composing, sweeping, planning; nothing left behind that did not run."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import DictConfig

from rlxf.config.keys import SECTIONS, is_known
from rlxf.config.load import load_config
from rlxf.core.command import Typed
from rlxf.core.errors import PlacementError
from tests.runs.small import command, make_world
from tests.unit.config.recipes import NAMES, ROOT, recipe
from workers import cli, train
from workers.address import running_cluster
from workers.dry_run import require_cores
from workers.train import main

TINY = ("--config-name", "online_dpo_trainer_tiny")


def ray_gpt(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, typed in ``folder``."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_gpt.py"), *arguments],
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_cfg_job_prints_the_composed_recipe_with_every_section(tmp_path: Path) -> None:
    done = ray_gpt(*TINY, "actor_rollout.lr=1e-6", "--cfg", "job", folder=tmp_path)
    recipe = yaml.safe_load(done.stdout)
    assert float(recipe["actor_rollout"]["lr"]) == 1e-6
    assert recipe["actor_rollout"]["adam_beta1"] is None
    assert recipe["sync"]["bucket_mb"] == 256
    assert done.returncode == 0


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_recipes_the_keys_used_most_and_where_the_rest_is(tmp_path: Path, option: str) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# Mine, for a friend.\n# More.\ntraining: {stage: sft}\n")
    (tmp_path / "recipes" / "bare.yaml").write_text("training: {stage: sft}\n")
    done = ray_gpt("--config-dir", "recipes", option, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) > 1)
    for name in NAMES:
        first = (cli.RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        assert rows[name] == first.removeprefix("# ")
        assert first.endswith(".")  # says something by itself
    assert rows["mine"] == "Mine, for a friend."
    assert "\n  bare\n" in done.stdout
    keys = [name for name in rows if "." in name and "=" not in name and name.split(".")[0] in SECTIONS]
    assert {"actor_rollout.load", "reward.load", "reward.function", "actor_rollout.data_path"} <= set(keys)
    assert all(is_known(key.split(".")) for key in keys)
    pages = [name for name in rows if name.startswith("docs/")]
    assert "docs/config.md" in pages
    assert all((ROOT / page).is_file() for page in pages)
    assert [path.name for path in tmp_path.iterdir()] == ["recipes"]


@pytest.mark.parametrize("program", [("rlxf", "train"), ("python", "ray_gpt.py"), ("python", "../a folder/ray_gpt.py")])
def test_help_names_the_command_that_was_typed(
    program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program[-1]])  # what follows it is written there, for Hydra
    with pytest.raises(SystemExit) as ended:
        main(program, ["--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    usage, *examples = [line.strip() for line in shown.splitlines() if "--config-name" in line]
    assert usage == f"{shlex.join(program)} --config-name RECIPE [key=value ...]"
    assert examples
    assert all(line.startswith(f"{shlex.join(program)} --config-name ") for line in examples)
    assert ("ray_gpt.py" in shown) == ("ray_gpt.py" in program[-1])


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    done = ray_gpt("-cn", "online_dpo_trainer_llama3_8b", "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert """ray start --head --port 6344 --resources='{"NPU": 8}'""" in done.stdout
    assert "2 machines" in done.stdout
    assert not list(tmp_path.iterdir())


HUGE = (*TINY, "training.device=cpu", "resource_pool.ref=[4000]")


def test_a_pool_far_beyond_the_cores_is_refused_before_ray_starts(tmp_path: Path) -> None:
    huge = make_world(tmp_path / "world").recipe(reward={"read_at": "last_token"}, resource_pool={"ref": [4000]})
    done = ray_gpt(*command(huge, tmp_path / "run")[2:], folder=tmp_path)
    assert done.returncode == 3, done.stderr
    cores = os.cpu_count() or 1
    assert "resource_pool.ref = [4000]" in done.stderr
    assert "4003 worker processes" in done.stderr
    assert f"{cores} cores" in done.stderr
    assert f"at most {8 * cores} processes" in done.stderr
    assert "resource_pool.ref=1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_recipe", "world"]  # no folder of Ray's, no run's


def test_a_dry_run_plans_for_other_machines_and_says_that_this_one_is_too_small(tmp_path: Path) -> None:
    done = ray_gpt(*HUGE, "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "needs: one machine with 4003 devices" in done.stdout or "needs: 2 machines with 4000 devices" in done.stdout
    assert "on this machine alone it would not start: resource_pool.ref = [4000]" in done.stdout


LARGE = ("-cn", "online_dpo_trainer_llama3_8b")


def test_a_dry_run_says_what_a_recipe_costs_on_its_device(tmp_path: Path) -> None:
    done = ray_gpt(*LARGE, "dry_run=true", "plan.price=2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 16 x NPU" in done.stdout  # the kind of the device that the recipe names
    for title in ("memory, estimate, GiB of 61.0", "time, estimate, seconds of a step of 128 rows", "1,000 steps:"):
        assert title in done.stdout
    assert not done.stderr
    assert "\033" not in done.stdout  # no colour in a file


def test_a_dry_run_of_what_does_not_fit_ends_with_ways_out(tmp_path: Path) -> None:
    done = ray_gpt(*LARGE, "dry_run=true", "plan.device=910b-32", folder=tmp_path)
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout
    first, *ways = done.stderr.splitlines()
    assert first.startswith("train: training, backward needs")
    assert len(ways) == 3
    words = ways[0].partition(": ")[2].split()
    assert ray_gpt(*LARGE, "dry_run=true", "plan.device=910b-32", *words, folder=tmp_path).returncode == 0


def test_all_tables_are_of_the_devices_that_are_searched(tmp_path: Path) -> None:
    done = ray_gpt(*LARGE, "dry_run=true", "plan.devices=8xh100-80", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 16 x GPU" in done.stdout
    assert "(NVIDIA H100, 80 GB, one device)" in done.stdout
    assert "910" not in done.stdout


def test_a_found_recipe_is_written_and_trains_what_was_typed(tmp_path: Path) -> None:
    typed = ("dry_run=true", "actor_rollout.lr=2e-7", "training.seed=9")
    done = ray_gpt(*LARGE, *typed, "plan.devices=8x910b-64", "plan.write=best.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the recipe as it is: " in done.stdout
    shown = ray_gpt("--config-dir", str(tmp_path), "-cn", "best", "--cfg", "job", folder=tmp_path)
    recipe = yaml.safe_load(shown.stdout)
    assert (float(recipe["actor_rollout"]["lr"]), recipe["training"]["seed"]) == (2e-7, 9)
    assert sum(recipe["resource_pool"]["actor_rollout"]) <= 8
    assert recipe["plan"]["devices"] is None
    assert recipe["dry_run"] in (None, False)
    assert [file.name for file in tmp_path.iterdir()] == ["best.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dry_run=true", "plan.device=910b"), 'plan.device = "910b": no such device'),
        (("dry_run=true", "plan.devices=16x910"), 'plan.device = "910": no such device'),
        (("dry_run=true", "plan.devices=cluster"), "no cluster is running here, which would have NPU"),
        (("plan.devices=16x910b-64",), "expected dry_run=true beside it"),
        (
            ("dry_run=true", "plan.devices=4x910b-32", "plan.write=best.yaml"),
            "nothing is written, because no layout fits",
        ),
    ],
)
def test_a_wrong_plan_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = ray_gpt(*LARGE, *words, folder=tmp_path)
    assert done.returncode in (1, 2)
    about = [line for line in done.stderr.splitlines() if said in line]
    assert len(about) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_ones_own_takes_every_key(tmp_path: Path) -> None:
    """In the reference layout, without the schema in its defaults list, in a folder of its own."""
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - model:\n      - tiny\n"
        "training: {stage: ray_online_dpo, seq_length: 64, distributed_backend: nccl}\n"
        "actor_rollout_ref:\n"
        "  actor_rollout: {model: tiny, load: a, data_path: b.jsonl, max_prompt_length: 32, clip_ratio: 0.2}\n"
        "  ref: {model: tiny}\n"
        "reward: {load: c}\n"
    )
    arguments = ("--config-dir", str(tmp_path), "--config-name", "mine.yaml", "log.interval=5", "actor_rollout.lr=1e-3")
    shown = yaml.safe_load(ray_gpt(*arguments, "--cfg", "job", folder=tmp_path).stdout)
    assert (shown["log"]["interval"], float(shown["actor_rollout"]["lr"])) == (5, 1e-3)
    done = ray_gpt(*arguments, "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "WARNING: accepted without effect: training.distributed_backend, actor_rollout.clip_ratio"
    ]


def test_multirun_composes_every_job(tmp_path: Path) -> None:
    done = ray_gpt(*TINY, "--multirun", "training.seed=1,2", "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan: ray_online_dpo") == 2


def test_an_override_may_be_added_forced_or_deleted(tmp_path: Path) -> None:
    signs = ("+training.seed=3", "++training.train_iters=4", "~actor_rollout.dpo_beta", "~log.tensorboard")
    done = ray_gpt(*TINY, *signs, "--cfg", "job", folder=tmp_path)
    recipe = yaml.safe_load(done.stdout)
    assert (recipe["training"]["seed"], recipe["training"]["train_iters"]) == (3, 4)
    assert (recipe["actor_rollout"]["dpo_beta"], recipe["log"]["tensorboard"]) == (None, None)


def test_a_run_folder_of_ones_own_is_used_and_other_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    ray_gpt(*TINY, "dry_run=true", "hydra.run.dir=mine", folder=tmp_path)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def no_cluster(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))


def record(folder: Path, address: str) -> None:
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


def test_no_cluster_is_found_where_none_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cluster(monkeypatch, tmp_path)
    assert running_cluster() is None
    record(tmp_path, "127.0.0.1:1")  # left behind by a Ray that was killed
    assert running_cluster() is None


def test_a_cluster_of_this_machine_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listening: str) -> None:
    no_cluster(monkeypatch, tmp_path)
    record(tmp_path, listening)
    assert running_cluster() == listening


def test_ray_address_names_the_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listening: str) -> None:
    no_cluster(monkeypatch, tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", listening)
    assert running_cluster() == listening
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert running_cluster() is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "nonsense"])
def test_a_named_cluster_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    no_cluster(monkeypatch, tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match="RAY_ADDRESS"):
        running_cluster()


def test_a_cluster_that_runs_says_itself_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listening: str
) -> None:
    huge = load_config(recipe(training={"device": "cpu"}, resource_pool={"ref": [4000]}))
    no_cluster(monkeypatch, tmp_path)
    with pytest.raises(PlacementError, match="4003 worker processes"):
        require_cores(huge)
    monkeypatch.setenv("RAY_ADDRESS", listening)
    require_cores(huge)


def test_ray_counts_accelerators_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cluster(monkeypatch, tmp_path)
    require_cores(load_config(recipe(training={"device": "npu"}, resource_pool={"ref": [4000]})))


def test_a_dry_run_against_a_cluster_that_is_gone_fails_in_one_line(tmp_path: Path) -> None:
    done = ray_gpt(*TINY, "dry_run=true", folder=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == PlacementError.exit_code
    assert done.stderr == "RAY_ADDRESS = 127.0.0.1:1: no Ray cluster answers there; start it, or unset RAY_ADDRESS\n"


@pytest.mark.parametrize(("runtime", "shared"), [("ray", True), ("local", False)])
def test_only_a_driver_of_ray_shares_one_heap(runtime: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module in ("workers.launch", "rlxf.assembly.local"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(launch=lambda *_: calls.append("launch")))
    monkeypatch.setattr(train, "share_heap", lambda: calls.append("share_heap"))
    config = load_config(recipe(training={"device": "cpu"}) | {"runtime": runtime})  # a plan needs no folders
    monkeypatch.setattr(train, "load_config", lambda *_, **__: config.model_copy(update={"dry_run": False}))
    monkeypatch.setattr(cli, "run_folder", Path)
    train.start(DictConfig({}), cli.read_command([]), Typed(config_name="tiny", arguments=()))
    assert calls == [*(["share_heap"] if shared else []), "launch"]
