"""What the page shows of one run, as JSON data: thinned, masked and rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from rlxf.report import about
from rlxf.report.mask import Mask
from rlxf.report.read import RunData, RunReader
from rlxf.report.rows import Columns, Row, number
from rlxf.report.state import state_of
from rlxf.report.table import start_and_end
from rlxf.report.texts import Answers, Pairs, short
from rlxf.report.thin import bucket_size, thin_curve, thin_means
from rlxf.report.verdicts import Verdicts

MAX_POINTS = 600  # of a curve
MAX_MARKS = 400  # checkpoints, resumes, faults and verdicts
_STAGES = ("gen", "adv", "ref", "update_actor", "sync", "eval", "save")
_RECOVERIES = ("recovered", "rebuilt", "disk is back")  # events that are no faults


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContent:
    """One run on the page."""

    data: dict[str, Any]  # JSON
    keys: tuple[tuple[str, str], ...]  # the recipe, masked: every key with its value


class RunPage:
    """One run on the page, read and made again as often as its files change."""

    def __init__(self, reader: RunReader) -> None:
        """``reader``: of its folder."""
        self._reader = reader
        self._pairs, self._answers = Pairs(), Answers()
        self._verdicts = Verdicts()

    def content(self, *, now: float, alive: bool | None = None, share: int = 1, label: str = "") -> RunContent:
        """The run as its files are now.

        Args:
            now: seconds since 1970.
            alive: whether its process is there; None if that is not known.
            share: the number of runs on the page, which share its room.
            label: by which the page tells it from the others.
        """
        run = self._reader.read()
        mask = Mask(run.config)
        config = mask.data(run.config)
        points = max(MAX_POINTS * 3 // max(share, 3), 60)
        verdicts = self._verdicts.update(run)
        safe = {
            "name": about.name_of(run),
            "label": label or about.name_of(run),
            "folder": about.shown_path(run.folder),
            "command": mask.command(about.command_of(run)),
            "state": asdict(state_of(run, now=now, alive=alive)),
            "online": about.is_online(run),
            "scaled": about.is_scaled(run),
            "facts": about.what_ran(run),
            "machine": about.where_it_ran(run),
            "verdicts": verdicts,
            "marks": _marks(run, verdicts)[-MAX_MARKS:],
            "notes": _notes(run),
            "plan": _plan(run),
        }
        data = {
            **_finite(mask.data(safe)),
            "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
            "table": _table(run),
            "curves": _curves(run.metrics, points),
            "evaluations": _evaluations(run.evaluations),
            "stages": _stages(run.metrics, points // 2),
            "pairs": self._pairs.data(run, share),
            "answers": self._answers.data(run, share),
        }
        return RunContent(data=data, keys=tuple(_flat(config)))


def _table(run: RunData) -> list[list[Any]]:
    rows = start_and_end(run, online=about.is_online(run), has_penalty=about.has_penalty(run))
    return [[row.title, row.metric, *map(short, (row.start, row.start_se, row.end, row.end_se))] for row in rows]


def _curves(metrics: Columns, points: int) -> dict[str, Any]:
    """``steps`` is shared by the curves that have a number at each of them; the others have steps of their own."""
    steps = list(metrics.steps)
    shared = steps if len(steps) <= points else []
    found: dict[str, Any] = {}
    for name, column in metrics.values.items():
        own, values = thin_curve(steps, column, points)
        if values and not name.startswith("eval/"):
            shown = [short(value) for value in values]
            found[name] = {"v": shown} if own == shared else {"s": own, "v": shown}
    return {"steps": shared, "bucket": bucket_size(len(steps), points), "of": found}


def _evaluations(evaluations: Columns) -> dict[str, Any]:
    places = range(len(evaluations))
    if len(evaluations) > MAX_POINTS:
        places = range(0, len(evaluations), -(-len(evaluations) // MAX_POINTS))
    found = {name: [short(column[place]) for place in places] for name, column in evaluations.values.items()}
    return {"steps": [evaluations.steps[place] for place in places], "of": found}


def _stages(metrics: Columns, points: int) -> dict[str, Any]:
    """Seconds of each stage as means over the same steps, so that they can be stacked."""
    names = [name for name in _STAGES if f"timing/{name}" in metrics.values]
    steps, means = thin_means(metrics.steps, [metrics.values[f"timing/{name}"] for name in names], points)
    bucket = -(-len(metrics) // points) if len(metrics) else 1
    of = {name: [short(value, 4) for value in values] for name, values in zip(names, means, strict=True)}
    return {"steps": steps, "bucket": bucket, "of": of}


def _marks(run: RunData, verdicts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What happened when: ``kind``, ``step``, ``time`` (may be empty) and ``text``."""
    at = {row.get("name"): row for row in run.journal if row.get("what") == "verdict"}
    found = [
        _mark("verdict", at.get(verdict["name"], {}), verdict["step"], f"{verdict['title']}: {verdict['seen']}")
        for verdict in verdicts
    ]
    marks = [*_of_journal(run.journal), *_of_events(run.events), *found]
    return sorted(marks, key=lambda mark: (mark["time"] or "9", mark["step"] or 0))


def _of_journal(rows: Sequence[Row]) -> Iterator[Row]:
    started = 0
    for row in rows:
        what, step = row.get("what"), _step(row)
        if what == "started":
            started += 1
            text = f"resumed after step {step}" if started > 1 or step else "started"
            yield _mark("resume" if started > 1 or step else "start", row, step, text)
        elif what == "checkpoint":
            yield _mark("checkpoint", row, step, str(row.get("folder") or "checkpoint"))
        elif what == "ended":
            yield _mark("end", row, step, str(row.get("message") or f"exit code {row.get('exit_code')}"))


def _of_events(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        what = str(row.get("event"))
        kind = "recovery" if what in _RECOVERIES else "fault"
        yield _mark(kind, row, _step(row), f"{what}: {row.get('message', '')}")


def _mark(kind: str, row: Row, step: int | None, text: str) -> Row:
    return {"kind": kind, "step": step, "time": str(row.get("time") or ""), "text": text}


def _step(row: Row) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _plan(run: RunData) -> list[list[Any]]:
    """Metrics that ``plan.json`` names anywhere: planned, and measured as the median of the run's second half."""
    rows = []
    for name, planned in _numbers(run.plan):
        column = run.metrics.values.get(name)
        if column is not None:
            known = sorted(value for value in column[len(column) // 2 :] if value == value)
            rows.append([name, short(planned), short(known[len(known) // 2]) if known else None])
    return rows


def _numbers(plan: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in plan.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif (found := number(value)) == found:
            yield str(name), found


def _notes(run: RunData) -> list[str]:
    notes = [f"{count} lines of {name} could not be read and are left out." for name, count in run.unread.items()]
    if not run.config:
        notes.append("config.yaml is missing, so the recipe is not known.")
    if not len(run.metrics):
        notes.append("metrics.jsonl has no row yet.")
    return notes


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, "null" if value is None else str(value)


def _finite(value: Any) -> Any:
    """The same without NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
