"""Start and end of a run: the rows of its final table, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlxf.observe.rows import table_rows
from rlxf.report.read import RunData

SE = "_se"  # a metric's standard error has its name with this end


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One metric: what it was at the start, and what it is now. NaN is unknown."""

    title: str
    metric: str
    start: float
    start_se: float
    end: float
    end_se: float


def start_and_end(run: RunData, *, online: bool, has_penalty: bool) -> list[TableRow]:
    """The rows that have a value at the start or at the end."""
    names = dict.fromkeys([*run.evaluations.values, *run.metrics.values])
    rows = table_rows(names, online=online, has_penalty=has_penalty)
    return [row for title, name in rows if name in names for row in _row(run, title, name)]


def _row(run: RunData, title: str, name: str) -> Iterator[TableRow]:
    columns = run.evaluations if name.startswith("eval/") and name in run.evaluations.values else run.metrics
    start, end = columns.first(name), columns.last(name)
    if start == start or end == end:
        errors = f"{name}{SE}"
        start_se, end_se = columns.first(errors), columns.last(errors)
        yield TableRow(title=title, metric=name, start=start, start_se=start_se, end=end, end_se=end_se)
