"""scripts/examples: what they type is a valid recipe, conversion or preprocessing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rlxf.config.load import load_config
from rlxf.config.schema import RunConfig
from rlxf.data.indexed import IndexedRows
from rlxf.placement.plan import NodeResources, fit, make_plan
from rlxf.tools.convert.command import read_command
from scripts.preprocess_data import main as preprocess_data
from tests.data_world import chat_tokenizer, write_rows
from tests.unit.config.recipes import ROOT, compose

EXAMPLES = ROOT / "scripts" / "examples"
RUNS = {"dpo_llama3_8b_full_ptd": 1, "dpo_llama3_8b_lora_ptd": 1, "online_dpo_llama3_8b": 2}  # machines
CONVERSIONS = ("convert_llama3_8b_hf2mcore", "convert_llama3_8b_mcore2hf")
DATA = {  # one row for each, and the keys that it becomes
    "data_convert_llama3_ppo": ({"prompt": "Q"}, {"input_ids", "attention_mask"}),
    "data_convert_llama3_dpo": (
        {"question": "Q", "chosen": "a", "rejected": "b", "system": ""},
        {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"},
    ),
    "data_convert_llama3_sft": (
        {"instruction": "Q", "input": "", "output": "A"},
        {"input_ids", "attention_mask", "labels"},
    ),
}
NAMES = (*RUNS, *CONVERSIONS, *DATA)


def typed(name: str, folder: Path, *more: str, **environment: str) -> list[str]:
    """The arguments that a script hands to python, which is a stand-in here."""
    stand_in = folder / "python"
    stand_in.write_text('#!/usr/bin/env bash\npwd\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    variables = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        [EXAMPLES / f"{name}.sh", *more],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    where, *arguments = done.stdout.splitlines()
    assert where == str(ROOT)
    return arguments


def composed(name: str, folder: Path, **environment: str) -> RunConfig:
    script, option, recipe, *overrides = typed(name, folder, "dry_run=true", "training.device=npu", **environment)
    assert (script, option) == ("ray_gpt.py", "--config-name")
    return load_config(compose(recipe, *overrides))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_executable_bash_that_stops_at_errors(name: str) -> None:
    script = EXAMPLES / f"{name}.sh"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("name", RUNS)
def test_a_launch_example_is_a_valid_recipe_that_fits_its_machines(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(composed(name, tmp_path))
    nodes = [NodeResources(name=f"n{i}", total={"NPU": 8}, free={"NPU": 8}) for i in range(RUNS[name])]
    assert fit(plan, nodes) == []
    assert not caplog.records


def test_the_paths_are_those_of_the_environment(tmp_path: Path) -> None:
    given = {"DATA_PATH": "/data/a b.jsonl", "CKPT_LOAD_DIR": "/models/mine", "CKPT_SAVE_DIR": "/out"}
    config = composed("dpo_llama3_8b_full_ptd", tmp_path, **given)
    assert (config.actor_rollout.load, config.ref.load, config.actor_rollout.save) == ("/models/mine",) * 2 + ("/out",)
    assert "/data/a b.jsonl" in str(config.actor_rollout.data_path)


def test_the_lora_example_has_no_second_model_and_the_batch_of_the_reference(tmp_path: Path) -> None:
    config = composed("dpo_llama3_8b_lora_ptd", tmp_path)
    assert config.reference_is_base
    actor = config.actor_rollout
    replicas = actor.num_gpus_for_train // actor.devices_per_replica
    assert actor.ppo_mini_batch_size * replicas == config.training.global_batch_size == 32
    assert (actor.lora_r, actor.lora_alpha, actor.lr) == (16, 32.0, 5e-6)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_example_is_a_valid_command(name: str, tmp_path: Path) -> None:
    script, *arguments = typed(name, tmp_path, LOAD_DIR="from", SAVE_DIR="to")
    assert script == "scripts/convert_ckpt.py"
    request = read_command(arguments)
    assert (request.load_dir, request.save_dir) == (Path("from"), Path("to"))
    assert not request.notes


@pytest.mark.parametrize("name", DATA)
def test_a_data_example_writes_the_files_of_its_stage(name: str, tmp_path: Path) -> None:
    row, keys = DATA[name]
    given = {
        "INPUT": tmp_path / "rows.jsonl",
        "TOKENIZER": tmp_path / "tokenizer",
        "OUTPUT_PREFIX": tmp_path / "out" / "x",
    }
    write_rows(given["INPUT"], [row])
    chat_tokenizer().save_pretrained(given["TOKENIZER"])
    script, *arguments = typed(name, tmp_path, **{key: str(path) for key, path in given.items()})
    assert script == "scripts/preprocess_data.py"
    assert preprocess_data(arguments) == 0
    assert set(IndexedRows(given["OUTPUT_PREFIX"]).columns) == keys
