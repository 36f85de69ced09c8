"""What the user sees of a run: a progress line and the final table."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from rlxf.core.types import Metrics  # which brings torch: a second that scripts/watch.py does not need


# Label, metric and format of the progress line; what a step does not have (offline: reward, tokens/s) is left out.
LINE = (
    ("loss", "loss", ".4f"),
    ("reward", "objective/scores", ".3f"),
    ("margin", "rewards/margins", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("kl", "objective/kl", ".3f"),
    ("tok/s", "rollout/tokens_per_s", ".0f"),
)


class Screen(io.StringIO):
    """Standard output. A full disk or a pipe that nobody reads costs lines, not the run."""

    @property
    def _out(self) -> TextIO:
        out: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a progress line puts itself in between
        return out

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute of the base class
        return self._out.encoding or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._out.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._out.flush()

    def isatty(self) -> bool:
        return self._out.isatty()

    def fileno(self) -> int:
        return self._out.fileno()


class Progressbar:
    """One line per ``interval`` steps: redrawn in a terminal, written out otherwise."""

    def __init__(self, console: Console, first_step: int, num_steps: int, interval: int) -> None:
        self.console = console
        self._first_step = first_step
        self._num_steps = num_steps
        self._interval = interval
        self._started = time.monotonic()  # of the first step
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task(f"step {first_step}/{num_steps}", total=num_steps, completed=first_step)
            self._bar.start()

    def begin(self) -> None:
        """Mark the beginning of the first step, from which the time left is estimated."""
        self._started = time.monotonic()

    def show(self, step: int, metrics: Metrics) -> None:
        """Report ``step`` complete steps."""
        if step % self._interval and step != self._num_steps:
            return
        line = self.line(step, metrics)
        if self._bar is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def line(self, step: int, metrics: Metrics) -> str:
        parts = [f"step {step}/{self._num_steps}"]
        parts += [f"{label} {metrics[name]:{form}}" for label, name, form in LINE if name in metrics]
        pace = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        return "  ".join([*parts, f"ETA {duration(pace * (self._num_steps - step))}"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """``75`` is ``1:15``, ``3675`` is ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def final_table(title: str, rows: Sequence[tuple[str, str]], columns: Mapping[str, Metrics]) -> Table:
    """Measures with their standard errors, ``5.506 ± 0.12``, where these are known.

    Args:
        title: above the table.
        rows: label and metric name; a metric that no column has is left out.
        columns: such as ``start`` and ``end``, each with its metrics.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    for head in columns:
        table.add_column(head, justify="right")
    for label, name in rows:
        if any(name in metrics for metrics in columns.values()):
            table.add_row(label, *(_cell(metrics, name) for metrics in columns.values()))
    return table


def _cell(metrics: Mapping[str, float], name: str) -> str:
    value, error = metrics.get(name, math.nan), metrics.get(f"{name}_se", math.nan)
    return "-" if math.isnan(value) else with_error(value, error)


def with_error(value: float, error: float) -> str:
    """``5.506 ± 0.12``: two digits of the standard error, three decimals at most; NaN: the value alone."""
    if not math.isfinite(error):
        return f"{value:.3f}"
    decimals = 3 if error < 0.1 else 2 if error < 1 else 1 if error < 10 else 0
    return f"{value:.3f} ± {error:.{decimals}f}"
