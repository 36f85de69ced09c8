"""The command that a message tells people to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlxf.core.command import Typed, short

ARGUMENTS = ("--config-name", "tiny", "training.resume=never", "hydra.run.dir=old", "reward.function='a b.py'")


def test_the_command_that_goes_on_is_the_one_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for program in (("python", "ray_gpt.py"), ("python", "/a folder/ray_gpt.py"), ("rlxf", "train")):
        typed = Typed("tiny", ARGUMENTS, program)
        begin = " ".join(f"'{word}'" if " " in word else word for word in program)
        kept = f"""{begin} --config-name tiny 'reward.function='"'"'a b.py'"'"''"""
        assert typed.going_on(tmp_path / "new") == f"{kept} hydra.run.dir=new"
        assert typed.with_last() == f"{kept} training.resume=last"


def test_a_path_is_short_below_the_current_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short("ray_gpt.py") == short(tmp_path / "ray_gpt.py") == "ray_gpt.py"
    assert short(tmp_path.parent / "ray_gpt.py") == str(tmp_path.parent / "ray_gpt.py")
