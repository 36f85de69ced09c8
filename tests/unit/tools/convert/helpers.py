"""Conversions as the command makes them, in this process, and comparisons of what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlxf.models.hf_folder import HfWeights
from rlxf.tools.convert.command import read_command
from rlxf.tools.convert.convert import convert


def run(load: Path, save: Path, *flags: str, kinds: tuple[str, str] = ("hf", "mg")) -> list[str]:
    """The lines that a conversion says."""
    said: list[str] = []
    arguments = ["--load-model-type", kinds[0], "--save-model-type", kinds[1]]
    arguments += ["--load-dir", str(load), "--save-dir", str(save), *flags]
    convert(read_command(arguments), said.append)
    return said


def back(load: Path, save: Path, *flags: str) -> Path:
    """megatron to Hugging Face."""
    run(load, save, *flags, kinds=("mg", "hf"))
    return save


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Names and every bit."""
    ours, theirs = HfWeights(found), HfWeights(expected)
    assert ours.names() == theirs.names()
    for name in sorted(theirs.names()):
        mine, other = ours.read(name), theirs.read(name)
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name


def settings_of(folder: Path) -> dict[str, Any]:
    """``config.json`` without the name of its dtype, which has changed its key."""
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in read.items() if key not in ("dtype", "torch_dtype")}


def hidden_leftovers(folder: Path) -> list[str]:
    """Temporary folders that a conversion has left behind."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
