"""``plan.calibrate`` that could not be written is a mistake of the recipe, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from rlxf.core.places import RECIPES
from tests.runs.small import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def load(world: World, path: Path, **changes: dict[str, Any]) -> None:
    load_config({"runtime": "local", **world.recipe(plan={"calibrate": str(path)}, **changes)})


FIGURES = (RECIPES / "device" / "h100-80.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nowhere/mine.yaml", None, "its folder does not exist"),
        ("mine.json", None, "ends in .yaml"),
        ("recipe.yaml", "training: {device: cpu}\n", "no file of a device's figures"),
        ("text.yaml", "- [\n", "no file of a device's figures"),
        ("binary.yaml", "\x00\x01", "no file of a device's figures"),
        ("half.yaml", FIGURES.split("train_share")[0], "no file of a device's figures"),
    ],
)
def test_what_it_cannot_write_or_would_destroy_is_refused(
    world: World, tmp_path: Path, name: str, content: str | None, expected: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"plan\.calibrate = ") as caught:
        load(world, path)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2
    assert content is None or path.read_text() == content


def test_a_folder_of_that_name_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="no file of a device's figures"):
        load(world, tmp_path / "folder.yaml")


def test_a_new_file_and_an_older_one_are_taken(world: World, tmp_path: Path) -> None:
    load(world, tmp_path / "new.yaml")
    (tmp_path / "old.yaml").write_text(FIGURES)
    load(world, tmp_path / "old.yaml")
    assert (tmp_path / "old.yaml").read_text() == FIGURES  # until the third step


def test_a_run_that_writes_none_does_not_ask(world: World, tmp_path: Path) -> None:
    load(world, tmp_path / "nowhere" / "mine.yaml", training={"eval_only": True}, eval={"num_prompts": 4})
