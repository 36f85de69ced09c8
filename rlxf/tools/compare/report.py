"""A comparison as a table for people and as files."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rlxf.core.errors import ConfigError
from rlxf.core.files import write_json, write_text
from rlxf.core.jsonl import finite_or_null
from rlxf.tools.compare.formats import Answered, Format, write_benchmark
from rlxf.tools.compare.models import Comparison, Generations
from rlxf.tools.compare.statistics import Floats, Interval, WinRate, win_rate


def judge(found: Comparison, *, confidence: float, resamples: int, seed: int) -> WinRate:
    """The win rate of the first model.

    Raises:
        ConfigError: the scorer gave no pair of scores.
    """
    try:
        return win_rate(
            *_sides(found),
            np.array(found.first.lengths, dtype=np.float64),
            np.array(found.second.lengths, dtype=np.float64),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(f"the models cannot be compared: {error}") from error


def _sides(found: Comparison) -> tuple[Floats, Floats]:
    """A number for each answer: the larger one of a prompt wins."""
    if found.verdicts is not None:  # exact: both are a half in a tie
        better = found.verdicts.probability.double()
        return better.numpy(), (1 - better).numpy()
    return found.first.scores.double().numpy(), found.second.scores.double().numpy()


def summary(found: Comparison, rate: WinRate, *, confidence: float) -> dict[str, Any]:
    """All numbers, as JSON data."""
    judged = {"judge": found.judged} if found.verdicts is not None else {}
    return {
        "prompts": len(found.prompts),
        "compared": rate.compared,
        "confidence": confidence,
        **asdict(rate),
        **{name: finite_or_null(_averages(said)) for name, said in (("a", found.first), ("b", found.second))},
        **judged,
    }


def _averages(said: Generations) -> dict[str, float]:
    known = said.scores[said.scores.isfinite()].double()
    return {
        "score": float(known.mean()) if known.numel() else math.nan,
        "length": float(np.mean(said.lengths)),
        "eos_rate": float(said.contains_eos.double().mean()),
    }


def table(found: Comparison, rate: WinRate, names: tuple[str, str], *, confidence: float) -> Table:
    """The table for the user: win rates with intervals; mean score, mean length and EOS rate of both models."""
    shown = Table(title=f"A = {names[0]}\nB = {names[1]}", title_justify="left")
    for column, justify in (
        ("measure", "left"),
        ("A", "right"),
        ("B", "right"),
        (f"A, {confidence:.0%} interval", "right"),
    ):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    shown.add_row("win rate, ties half", *_both(rate.rate), f"{_text(rate.wilson)} Wilson")
    shown.add_row("", "", "", f"{_text(rate.bootstrap)} bootstrap")
    controlled = rate.length_controlled_bootstrap
    shown.add_row("win rate at equal lengths", *_both(rate.length_controlled), f"{_text(controlled)} bootstrap")
    shown.add_row("wins", str(rate.wins), str(rate.losses), f"{rate.ties} ties of {rate.compared} prompts")
    missing = len(found.prompts) - rate.compared
    judged = found.verdicts is not None
    if missing:
        shown.add_row("without a verdict" if judged else "without a score", "", "", f"{missing} prompts, not counted")
    if "position_flip" in found.judged:
        agree = f"of {found.verdicts.counts.both} prompts" if found.verdicts is not None else ""
        shown.add_row("same verdict in both orders", f"{1 - found.judged['position_flip']:.3f}", "", agree)
    if found.judged.get("calls"):
        spent = f"{found.judged['calls']:.0f} calls, cost {found.judged['cost']:.4g}"
        shown.add_row("judge", "", "", spent)
    first, second = _averages(found.first), _averages(found.second)
    for label, key in (("mean score", "score"), ("mean length, characters", "length"), ("EOS rate", "eos_rate")):
        if key == "score" and judged:
            continue
        shown.add_row(label, f"{first[key]:.3f}", f"{second[key]:.3f}", "")
    return shown


def _both(rate: float) -> tuple[str, str]:
    return f"{rate:.3f}", f"{1 - rate:.3f}"


def _text(interval: Interval) -> str:
    return f"{interval.low:.3f} - {interval.high:.3f}"


def write(folder: Path, found: Comparison, numbers: dict[str, Any]) -> None:
    """``pairs.jsonl``, a row per prompt, and ``summary.json``; both are there, or none.

    Raises:
        ConfigError: the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in pairs(found)]
        write_text(folder / "pairs.jsonl", "\n".join(lines) + "\n")
        write_json(folder / "summary.json", numbers)
    except OSError as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}") from error


def pairs(found: Comparison) -> Iterator[dict[str, Any]]:
    """A row per prompt: both answers, their scores, and who won."""
    sides = found.first, found.second
    numbers = _sides(found)
    for row, (number, prompt) in enumerate(zip(found.row_ids, found.prompts, strict=True)):
        yield {
            "row": number,
            "prompt": prompt,
            **{name: said.texts[row] for name, said in zip("ab", sides, strict=True)},
            **_numbers(found, row),
            **{f"eos_{name}": bool(said.contains_eos[row]) for name, said in zip("ab", sides, strict=True)},
            "winner": _winner(float(numbers[0][row]), float(numbers[1][row])),
        }


def _numbers(found: Comparison, row: int) -> dict[str, float | None]:
    """What decides a prompt: the verdict, in each order that was asked; else both scores."""
    verdicts = found.verdicts
    if verdicts is None:
        sides = (("a", found.first), ("b", found.second))
        return {f"score_{name}": _or_null(float(said.scores[row])) for name, said in sides}
    asked = {"a_better": verdicts.probability, "asked_a_first": verdicts.as_asked, "asked_b_first": verdicts.swapped}
    return {name: _or_null(float(values[row])) for name, values in asked.items()}


def _or_null(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _winner(first: float, second: float) -> str | None:
    if not (math.isfinite(first) and math.isfinite(second)):
        return None
    return "tie" if first == second else "a" if first > second else "b"


def judge_name(section: dict[str, Any]) -> str:
    """What a judge is called in a benchmark's files."""
    named = section.get("model") or Path(str(section.get("load") or section.get("function") or "judge")).stem
    return re.sub(r"[^A-Za-z0-9._-]", "_", str(named))


def write_files(folder: Path, form: Format, found: Comparison, names: tuple[str, str], judge: str) -> list[Path]:
    """The benchmark's own files; returns their paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    assert found.verdicts is not None  # a benchmark has a judge
    assert found.questions is not None
    answered = Answered(
        questions=found.questions,
        answers=(found.first.texts, found.second.texts),
        names=names,
        judge=judge,
        probability=found.verdicts.probability,
        as_asked=found.verdicts.as_asked,
        swapped=found.verdicts.swapped,
    )
    try:
        return write_benchmark(folder, form, answered)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}") from error
