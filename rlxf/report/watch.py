"""``python scripts/watch.py RUN``: how a run goes, in a terminal, from the files that the page is made of."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlxf.core.errors import RlxfError
from rlxf.observe.console import duration
from rlxf.report.about import has_penalty, is_online, name_of
from rlxf.report.read import RunData, RunReader
from rlxf.report.rows import Columns, number
from rlxf.report.state import State, state_of
from rlxf.report.table import start_and_end
from rlxf.report.thin import thin_means
from rlxf.report.verdicts import Verdicts

INTERVAL_S = 5.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # points of a curve
# What is drawn, the first ones of a run that it has.
_CURVES = (
    ("reward", ("eval/reward", "objective/scores")),
    ("win rate", ("eval/win_rate",)),
    ("KL, nats", ("eval/kl", "objective/kl")),
    ("length", ("eval/length", "response_length/mean")),
    ("EOS rate", ("eval/eos_rate", "val/contain_eos_token")),
    ("distinct answers", ("eval/distinct", "rollout/distinct")),
    ("tie rate", ("pair/tie_rate",)),
    ("loss", ("eval/loss", "loss")),
    ("accuracy", ("eval/accuracy", "rewards/accuracies", "accuracy")),
    ("gradient norm", ("grad_norm",)),
)
_STAGES = ("gen", "adv", "ref", "update_actor", "sync", "eval", "save")
_ROLES = ("train", "infer", "ref", "reward")
_COLOURS = {"running": "cyan", "ended": "green", "stopped": "yellow", "failed": "red", "killed": "red"}
_TEXT_CHARACTERS = 400  # of a prompt or a completion


class Watch:
    """The picture of one run folder, read anew at every look."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if it is no run folder."""
        self._reader = RunReader(folder)
        self._verdicts = Verdicts()

    def look(self) -> tuple[State, RenderableType]:
        """How the run stands, and the picture."""
        run = self._reader.read()
        state = state_of(run, now=time.time())
        parts = [
            _head(run, state),
            _verdicts(self._verdicts.update(run)),
            _numbers(run),
            _curves(run),
            _machine(run.metrics),
            *_events(run),
            *_newest_pair(run),
        ]
        return state, Group(*parts)


def _head(run: RunData, state: State) -> RenderableType:
    total = state.num_steps or max(state.step, 1)
    line = Text.assemble(
        (visible(name_of(run)), "bold"), "  ", (visible(state.text), _COLOURS[state.word]),
        f"  step {state.step}" + (f" of {state.num_steps}" if state.num_steps else ""),
    )  # fmt: skip
    if state.seconds is not None:
        line.append(f"  {duration(state.seconds)}")
    if state.seconds_left is not None:
        line.append(f", {duration(state.seconds_left)} left")
    return Group(line, ProgressBar(total=total, completed=state.step), Text(visible(str(run.folder)), "dim"))


def _verdicts(found: list[dict[str, Any]]) -> RenderableType:
    if not found:
        return Text("no verdict: no rule of docs/health.md holds", "green")
    lines = [
        Text.assemble(
            (verdict["title"], "bold red"), f", since step {verdict['step']}: {visible(verdict['seen'])}\n  ",
            (visible(verdict["advice"]), ""), (f" ({verdict['anchor']})", "dim"),
        )
        for verdict in found
    ]  # fmt: skip
    return Panel(Group(*lines), title="verdicts", border_style="red", box=box.ROUNDED)


def _numbers(run: RunData) -> RenderableType:
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("")
    table.add_column("start", justify="right")
    table.add_column("now", justify="right")
    for row in start_and_end(run, online=is_online(run), has_penalty=has_penalty(run)):
        table.add_row(visible(row.title), _with_error(row.start, row.start_se), _with_error(row.end, row.end_se))
    return table


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def _curves(run: RunData) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for title, names in _CURVES:
        found = next(((columns, name) for name in names for columns in _with(run, name)), None)
        if found is not None:
            columns, name = found
            values = columns.column(name)
            table.add_row(title, sparkline(columns.steps, values), f"{columns.last(name):.4g}", Text(name, "dim"))
    return table


def _with(run: RunData, name: str) -> Iterator[Columns]:
    """The rows that have numbers of a metric."""
    for columns in (run.evaluations, run.metrics):
        if not math.isnan(columns.last(name)):
            yield columns


def sparkline(steps: Sequence[int], values: Sequence[float]) -> str:
    """A curve in one line, from its smallest to its largest number; a space where nothing is known."""
    _, (means,) = thin_means(steps, [values], _WIDTH)
    known = [value for value in means if not math.isnan(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    width, top = (high - low or 1.0), len(_BARS) - 1  # divided first: its inverse may be too large for a float
    return "".join(" " if math.isnan(value) else _BARS[round((value - low) / width * top)] for value in means)


def _machine(metrics: Columns) -> RenderableType:
    stages = [f"{name} {metrics.last(f'timing/{name}'):.2f}" for name in _STAGES if _known(metrics, f"timing/{name}")]
    idle = [
        f"{role} {metrics.last(f'timing/idle_{role}'):.0%}" for role in _ROLES if _known(metrics, f"timing/idle_{role}")
    ]
    lines = []
    if stages:
        lines.append(f"seconds of the newest step: {', '.join(stages)}")
    if idle:
        lines.append(f"idle: {', '.join(idle)}")
    if _known(metrics, "rollout/tokens_per_s"):
        lines.append(f"{metrics.last('rollout/tokens_per_s'):,.0f} sampled tokens per second")
    return Text("\n".join(lines))


def _known(metrics: Columns, name: str) -> bool:
    return not math.isnan(metrics.last(name))


def _events(run: RunData) -> Iterator[RenderableType]:
    for row in run.events[-2:]:
        when = str(row.get("time", ""))[:19].replace("T", " ")
        yield Text(f"{when}  {visible(str(row.get('message') or row.get('event') or ''))}", "yellow")


def _newest_pair(run: RunData) -> Iterator[RenderableType]:
    row = run.samples.row(len(run.samples) - 1) if len(run.samples) else None
    if row is None:
        return
    prompt = row.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    shown = str(last.get("content", "")) if isinstance(last, dict) else str(last or "")
    lines = [Text(f"pair of step {row.get('step')}: {_short(shown)}", "dim")]
    for side, colour in (("chosen", "green"), ("rejected", "red")):
        score = number(row.get(f"{side}_score"))
        known = "" if math.isnan(score) else f" ({score:.3f})"
        lines.append(Text.assemble((f"{side}{known}: ", colour), _short(str(row.get(side, "")))))
    yield Panel(Group(*lines), box=box.ROUNDED, border_style="dim")


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= _TEXT_CHARACTERS else f"{shown[:_TEXT_CHARACTERS]} ..."


def visible(text: str) -> str:
    """Text that cannot steer a terminal: what does not print is written as its number."""
    return "".join(one if one.isprintable() or one == "\n" else f"\\x{ord(one):02x}" for one in text)


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="watch", description="How a run goes, in a terminal. Ctrl-C ends the watch.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--once", action="store_true", help="one look; also where the output is no terminal")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help=f"seconds between looks ({INTERVAL_S:g})")
    found = parser.parse_args(arguments)
    if not found.interval > 0:
        parser.error(f"--interval: expected seconds above 0, got {found.interval:g}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until the run has ended, or Ctrl-C. The exit code; an error is one line."""
    found, console = read_arguments(arguments), Console()
    try:
        watch = Watch(found.run)
        if found.once or not console.is_terminal:
            console.print(watch.look()[1])
            return 0
        _watch(watch, console, found.interval)
    except RlxfError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def _watch(watch: Watch, console: Console, interval_s: float) -> None:
    state, picture = watch.look()
    with Live(picture, console=console, auto_refresh=False, screen=False, vertical_overflow="visible") as live:
        while state.word == "running":
            time.sleep(interval_s)
            state, picture = watch.look()
            live.update(picture, refresh=True)
