"""docs/migration.md names keys that exist: ours in the schema, TRL's in TRL."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rlxf.config.keys import LEGACY, SECTIONS, keys_of, unknown_key
from rlxf.config.roles import ActorConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
_CODE = re.compile(r"`([^`]+)`")


def rows(title: str) -> list[list[str]]:
    """The cells of the rows of a section's table."""
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(f"{title}\n"))
    table = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


TITLES = ("MindSpeed-LLM", "TRL", "OpenRLHF", "verl")
NAMED = [(title, key) for title in TITLES for row in rows(title) for key in _CODE.findall(row[1])]


def is_a_key(text: str) -> bool:
    """Whether ``section.key``, or ``section.key=value``, stands in the schema of that section itself."""
    section, _, key = text.partition("=")[0].rpartition(".")
    if section.startswith("model."):
        return key in keys_of("model")
    return section in SECTIONS and key in SECTIONS[section].model_fields


@pytest.mark.parametrize("title", TITLES)
def test_a_table_is_a_table(title: str) -> None:
    assert len(rows(title)) > 15
    assert {len(row) for row in rows(title)} == {3}


def test_every_key_exists() -> None:
    assert not [(title, key) for title, key in NAMED if not is_a_key(key)]
    assert len(NAMED) > 150


def test_a_key_of_the_remarks_exists_too() -> None:
    text = PAGE.read_text(encoding="utf-8")
    ours = {code for code in _CODE.findall(text) if "." in code and code.split(".")[0] in SECTIONS}
    ours -= {code for row in rows("verl") for code in _CODE.findall(row[0])}
    assert not {code for code in ours if not is_a_key(code)}
    assert len(ours) > 80


def test_names_of_trl_are_those_of_trl() -> None:
    import trl
    from trl.experimental.online_dpo import OnlineDPOConfig

    configs = (trl.DPOConfig, trl.SFTConfig, trl.RewardConfig, OnlineDPOConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    named = {name for row in rows("TRL") for name in _CODE.findall(row[0])}
    assert not named - known
    # Whatever a preference loss depends on is in the table.
    plain = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)} - plain
    assert not own - named - {"precompute_ref_batch_size", "disable_dropout"}


def test_flags_that_are_accepted_and_read_by_nothing_are_accepted() -> None:
    row = next(row for row in rows("MindSpeed-LLM") if "--is-pairwise-dataset" in row[0])
    for flag in _CODE.findall(row[0]):
        assert flag.removeprefix("--").replace("-", "_") in LEGACY["training"]


def test_a_recipe_that_uses_a_name_of_trl_is_told_ours() -> None:
    for theirs, ours, _ in rows("TRL"):
        keys = [key.rpartition(".")[2] for key in _CODE.findall(ours)]
        for name in _CODE.findall(theirs) if keys else ():
            known = any(is_a_key(f"{section}.{name}") for section in SECTIONS)
            assert known or any(f'.{key}"?' in unknown_key(("training", name)) for key in keys), name


def test_every_setting_of_a_preference_loss_has_a_name_elsewhere() -> None:
    losses = {f"actor_rollout.{key}" for key in ActorConfig.model_fields if key.startswith(("dpo_", "f_", "disco"))}
    assert not losses - {key for _, key in NAMED} - {"actor_rollout.dpo_logp_reduction"}
