"""Wrong keys of the planner, and wrong files of devices: each is one clear line, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from rlxf.core.places import RECIPES
from rlxf.planner.device import Device, device_names
from rlxf.planner.estimate import device_of
from rlxf.planner.recipe import write_recipe
from rlxf.planner.search import search
from tests.unit.config.recipes import compose, recipe

OFFLINE = {"training": {"stage": "dpo"}, "actor_rollout": {"max_prompt_length": 32}}

BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"devices": "16"}, 'plan.devices = "16": expected a number of devices and their kind, such as 16x910b-64'),
    ({"devices": "0x910b-64"}, "such as 16x910b-64, or cluster"),
    ({"devices": "910b-64x16"}, "such as 16x910b-64, or cluster"),
    ({"devices": "-4xcpu"}, "such as 16x910b-64, or cluster"),
    ({"devices": "1.5xcpu"}, "such as 16x910b-64, or cluster"),
    ({"devices": "16 x 910b-64"}, "such as 16x910b-64, or cluster"),
    ({"devices": 16}, "plan.devices = 16: expected text"),
    ({"write": "best.yaml"}, "expected plan.devices beside it"),
    ({"write": "best.txt", "devices": "4xcpu"}, "expected the name of a .yaml file"),
    ({"price": -1.0}, "plan.price = -1.0: expected at least 0"),
    ({"price": float("nan")}, "plan.price = NaN: expected a finite number"),
    ({"price": "2 dollars"}, "plan.price"),
    ({"prompt_tokens": 0}, "plan.prompt_tokens = 0: expected at least 1"),
    ({"prompt_tokens": 64}, "expected less than actor_rollout.seq_length = 64"),
    ({"completion_tokens": 33}, "expected at most 32, the longest completion"),
    ({"completion_tokens": True}, "plan.completion_tokens = true"),
    ({"device": 910}, "plan.device = 910: expected text"),
    ({"devcie": "cpu"}, "devcie"),
]


@pytest.mark.parametrize(("plan", "said"), BAD_KEYS)
def test_a_wrong_key_is_one_line(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as failed:
        load_config(recipe(plan=plan))
    about = [problem for problem in failed.value.problems if said in problem]
    assert len(about) == 1, failed.value.problems
    assert len(failed.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": {"devices": "4xcpu"}, "dry_run": False}, "expected dry_run=true beside it"),
        ({"plan": {"devices": "4xcpu"}, "runtime": "local"}, "expected runtime=ray"),
        ({"plan": {"completion_tokens": 64}, **OFFLINE}, "expected at most 63"),
    ],
)
def test_keys_that_do_not_fit_the_recipe(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(recipe(**changes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("910b", 'no such device; did you mean "910b-64"|did you mean "910b-32"|did you mean "910c"'),
        ("h100", "did you mean"),
        ("tpu", f"expected one of {', '.join(device_names())}"),
        ("missing.yaml", "no such device"),
    ],
)
def test_an_unknown_device(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Device.load(name)


def _file(**changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = yaml.safe_load((RECIPES / "device" / "910b-64.yaml").read_text())
    return {key: value for key, value in {**figures, **changes}.items() if value != "left out"}


FIGURE = {"source": "data sheet", "date": "2026-11-26"}
BAD_FILES: list[tuple[Any, str]] = [
    (["a list"], "is not a mapping of figures"),
    (_file(memory_gib="left out"), "memory_gib is required: a mapping of value, source and date"),
    (_file(memory_gib=61), "memory_gib"),
    (_file(memory_gib={"value": -1, **FIGURE}), "memory_gib.value = -1: expected at least 0"),
    (_file(memory_gib={"value": 61, "date": "2026-11-26"}), "memory_gib.source is required"),
    (_file(bf16_tflops={"value": "many", **FIGURE}), "bf16_tflops.value"),
    (_file(kind="tpu"), "kind"),
    (_file(per_node=0), "per_node = 0: expected at least 1"),
    (_file(memory={"value": 61, **FIGURE}), "memory: unknown key|memory unknown key"),
    (_file(train_share={"value": float("inf"), **FIGURE}), "train_share.value"),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES)
def test_a_wrong_file_of_a_device(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=said) as failed:
        Device.load(str(path))
    assert str(path) in str(failed.value)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"kind: [npu\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        Device.load(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        Device.load(str(path))


def test_a_number_that_only_a_cpu_may_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(_file(memory_gib={"value": None, **FIGURE})))
    with pytest.raises(ConfigError, match="memory_gib has no value"):
        _ = Device.load(str(path)).memory


def test_a_device_of_another_kind_than_the_recipes_is_not_taken() -> None:
    config = load_config(compose("online_dpo_trainer_llama3_8b", "dry_run=true", "training.device=cuda"))
    device, note = device_of(config)
    assert device.name == "h100-80"
    assert "plan.device = 910b-64 is no cuda" in note


def test_a_recipe_is_not_written_over_a_file_of_somebody_else(tmp_path: Path) -> None:
    config = load_config(compose("online_dpo_trainer_llama32_1b", "dry_run=true"))
    found = search(config, Device.load("910b-64"), 4, most=1)[0]
    mine = tmp_path / "mine.yaml"
    mine.write_text("# mine\n")
    with pytest.raises(ConfigError, match="is no recipe of the planner"):
        write_recipe(mine, "online_dpo_trainer_llama32_1b", {}, found)
    assert mine.read_text() == "# mine\n"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_recipe(mine / "best.yaml", "online_dpo_trainer_llama32_1b", {}, found)
    assert sorted(tmp_path.iterdir()) == [mine]
