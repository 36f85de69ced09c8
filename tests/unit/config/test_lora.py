"""The LoRA keys: what belongs together, what a device can do, and what an adapter folder must say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlxf.config import lora
from rlxf.config.load import load_config
from rlxf.config.lora import lora_problems
from rlxf.config.schema import RunConfig, TrainingConfig
from rlxf.core.errors import ConfigError
from tests.settings import run_config
from tests.unit.config.recipes import recipe


def problems(*, device: str = "cpu", dry_run: bool = False, **actor: Any) -> list[str]:
    config: RunConfig = run_config(Path("model"), **actor)
    training = TrainingConfig(stage="ray_online_dpo", device=device)  # type: ignore[arg-type]
    return [p.text for p in lora_problems(config.model_copy(update={"training": training, "dry_run": dry_run}))]


def adapter(folder: Path, **settings: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16} | settings))
    return str(folder)


def test_what_fits_together_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda _: object())
    path = adapter(tmp_path / "adapter")
    assert not problems()
    assert not problems(lora_r=8)
    assert not problems(lora_r=8, lora_alpha=16.0, lora_load=path, qlora=True)
    assert not problems(lora_r=8, lora_alpha=16.0, lora_load=path, qlora=True, device="cuda")


@pytest.mark.parametrize(
    ("actor", "says"),
    [
        ({"qlora": True}, "actor_rollout.qlora = true: needs actor_rollout.lora_r > 0"),
        ({"lora_load": "adapter"}, 'actor_rollout.lora_load = "adapter": needs actor_rollout.lora_r > 0'),
        ({"lora_r": 8, "lora_target_modules": ()}, "actor_rollout.lora_target_modules = []: expected at least one of"),
    ],
)
def test_keys_that_need_others_say_so(actor: dict[str, Any], says: str) -> None:
    (line,) = problems(**actor)
    assert line.startswith(says)


def test_4_bits_are_refused_where_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = problems(lora_r=8, qlora=True, device="npu")
    assert line.startswith("actor_rollout.qlora = true: expected false: bitsandbytes")
    assert line.endswith("no kernels for npu")
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    (line,) = problems(lora_r=8, qlora=True)
    assert line == "actor_rollout.qlora = true: needs bitsandbytes, which is not installed: pip install 'rlxf[qlora]'"
    assert not problems(lora_r=8, qlora=True, dry_run=True)  # a plan for another machine
    assert problems(lora_r=8, qlora=True, dry_run=True, device="npu")


def test_an_adapter_of_another_rank_or_scale_is_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter")
    lines = problems(lora_r=16, lora_alpha=32.0, lora_load=path)
    assert lines[0].startswith("actor_rollout.lora_r = 16: the adapter that actor_rollout.lora_load names was trained")
    assert lines[0].endswith("with 8; set it to that")
    assert lines[1].startswith("actor_rollout.lora_alpha = 32.0: ")
    assert len(lines) == 2


@pytest.mark.parametrize("content", [None, "{", "[]", '{"r": 8}', '{"r": "many", "lora_alpha": 16}'])
def test_a_folder_without_an_adapter_is_named(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "adapter").mkdir()
    if content is not None:
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    (line,) = problems(lora_r=8, lora_load=str(tmp_path / "adapter"))
    assert line.startswith("actor_rollout.lora_load = ")
    assert ("cannot be read" if content else "holds no adapter_config.json; expected a PEFT folder") in line


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("linear_qvk", "linear_qkv"),
        ("q_proj", "linear_qkv"),
        ("up_proj", "linear_fc1"),
        ("o_proj", "linear_proj"),
        ("down_proj", "linear_fc2"),
    ],
)
def test_an_unknown_target_module_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(actor_rollout={"lora_target_modules": [name]}))
    (line,) = caught.value.problems
    assert line.startswith("actor_rollout.lora_target_modules = ")
    assert line.endswith(f'expected one of linear_qkv, linear_proj, linear_fc1, linear_fc2; did you mean "{near}"?')


def test_keys_without_a_rank_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(recipe(training={"lora_alpha": 16}, actor_rollout={"lora_dropout": 0.1}))
    assert "these keys have no effect with actor_rollout.lora_r = 0, which trains all parameters" in caplog.text
    assert "actor_rollout.lora_alpha, actor_rollout.lora_dropout" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_config(recipe())
    assert "lora" not in caplog.text


def test_which_reference_a_lora_run_has_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(recipe(actor_rollout={"lora_r": 8}))
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        load_config(recipe(actor_rollout={"lora_r": 8}, resource_pool={"ref": 2}))
    assert "resource_pool.ref has no effect with LoRA: the reference is the actor with its adapters off" in caplog.text
    with caplog.at_level(logging.WARNING):
        load_config(recipe(actor_rollout={"lora_r": 8}, ref={"load": "another"}))
    assert "the reference is a second model, on its own devices" in caplog.text


def test_a_whole_number_for_alpha_is_a_number() -> None:
    assert load_config(recipe(actor_rollout={"lora_alpha": 16})).actor_rollout.lora_alpha == 16.0
