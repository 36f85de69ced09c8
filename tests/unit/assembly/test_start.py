"""Where a run that has lost its trainer goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly import start
from rlxf.assembly.start import Prepared, find_again
from tests.settings import run_config


def prepared(tmp_path: Path, **training: Any) -> Prepared:
    config = run_config(tmp_path)
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    data: Any = None
    return Prepared(config=config, run_dir=tmp_path, data=data, resume=None)


def asked(monkeypatch: pytest.MonkeyPatch, found: Prepared, answers: dict[str, str]) -> Any:
    """What it finds, where ``training.resume`` finds these."""
    monkeypatch.setattr(start, "find_resume", lambda config, run_dir: answers.get(config.training.resume))
    return find_again(found)


def test_it_goes_on_from_its_newest_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"auto": "newest", "other/iter_0000002": "the first"}
    found = prepared(tmp_path, resume="other/iter_0000002")
    assert asked(monkeypatch, found, answers) == "newest"
    assert asked(monkeypatch, found, {**answers, "auto": ""}) == "the first"  # it has saved none so far
    assert asked(monkeypatch, prepared(tmp_path, resume="never"), {}) is None


def test_an_evaluation_alone_evaluates_what_it_was_to_evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = prepared(tmp_path, resume="iter_0000002", eval_only=True)
    assert asked(monkeypatch, found, {"auto": "newest", "iter_0000002": "wanted"}) == "wanted"
