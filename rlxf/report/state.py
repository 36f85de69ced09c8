"""Whether a run goes on, how it ended, and how long it still takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlxf.report.read import RunData
from rlxf.report.rows import Row, number

Word = Literal["running", "ended", "stopped", "failed", "killed"]

_STOPPED = (130, 143)  # exit codes: the user asked for the end
_LATER = 75  # the run cannot go on now, but later it can
_QUIET_S = 120.0  # a run whose files are older may be dead
_QUIET_STEPS = 5.0  # or older than this many of its steps
_RECENT = 20  # steps from which the pace is taken
_SECONDS = ("timing/all", "timing/eval", "timing/save")


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How a run stands."""

    word: Word
    text: str  # one sentence for people
    step: int  # complete steps
    num_steps: int | None  # planned; None if the recipe counts in epochs and no step was recorded
    seconds_left: float | None  # None if the run has ended, or no step has been done
    seconds: float | None  # that the run has taken, as far as its files say


def state_of(run: RunData, *, now: float, alive: bool | None = None) -> State:
    """How a run stands.

    Args:
        run: what its files say.
        now: seconds since 1970.
        alive: whether the process of the run is there; None if that is not known.
    """
    num_steps = planned_steps(run)
    step = run.step
    word, text = _end(run, step, num_steps) or _without_end(run, now, alive)
    pace = step_seconds(run)
    left = max(num_steps - step, 0) * pace if word == "running" and num_steps and pace is not None else None
    taken = number(run.summary.get("seconds")) if word == "ended" else float("nan")
    return State(
        word=word,
        text=text,
        step=step,
        num_steps=num_steps,
        seconds_left=left,
        seconds=taken if taken == taken else _total_seconds(run),
    )


def planned_steps(run: RunData) -> int | None:
    """Driver steps of the whole run; None if no file says."""
    training = run.config.get("training")
    planned = [row.get("num_steps") for row in reversed(run.journal) if row.get("what") == "started"]
    planned.append(training.get("train_iters") if isinstance(training, dict) else None)
    return next((steps for steps in planned if isinstance(steps, int) and steps > 0), None)


def step_seconds(run: RunData) -> float | None:
    """Wall seconds of a step, evaluations and checkpoints included: mean of the newest ones."""
    return _mean_of(
        [_step_seconds(run, index) for index in range(max(len(run.metrics) - _RECENT, 0), len(run.metrics))]
    )


def _total_seconds(run: RunData) -> float | None:
    known = [value for index in range(len(run.metrics)) if (value := _step_seconds(run, index)) is not None]
    return sum(known) if known else None


def _step_seconds(run: RunData, index: int) -> float | None:
    parts = [run.metrics.values[name][index] for name in _SECONDS if name in run.metrics.values]
    known = [part for part in parts if part == part]
    return sum(known) if known else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _end(run: RunData, step: int, num_steps: int | None) -> tuple[Word, str] | None:
    """The end that the files name; None if they name none."""
    rows = [row for row in run.journal if row.get("what") in ("started", "ended")]
    if rows:
        return _recorded(rows[-1]) if rows[-1]["what"] == "ended" else None
    ended = [row for row in run.events if row.get("event") == "ended"]
    summed = run.summary.get("steps")
    if isinstance(summed, int) and summed >= step:
        return "ended", "The run ended well."
    if ended and not _later_rows(run, ended[-1]):
        return _recorded(ended[-1])
    if num_steps is not None and step >= num_steps and run.summary:
        return "ended", "The run ended well."
    return None


def _recorded(row: Row) -> tuple[Word, str]:
    code, message = row.get("exit_code"), str(row.get("message") or "").strip()
    if code == 0:
        return "ended", message or "The run ended well."
    if code in _STOPPED:
        return "stopped", message or "The run was stopped."
    if code == _LATER:
        return "failed", message or "The run cannot go on now; later it can."
    return "failed", message or f"The run ended with exit code {code}."


def _later_rows(run: RunData, row: Row) -> bool:
    """Whether steps were done after a failure, by a run that was resumed."""
    failed_in = row.get("step")
    return isinstance(failed_in, int) and run.step >= failed_in


def _without_end(run: RunData, now: float, alive: bool | None) -> tuple[Word, str]:
    if alive is None:
        alive = _holds_lock(run) or now - run.changed_at < max(_QUIET_S, _QUIET_STEPS * (step_seconds(run) or 0.0))
    if alive:
        return "running", "The run goes on."
    return "killed", "The run recorded no end: it was killed, or its machine was lost. The same command continues it."


def _holds_lock(run: RunData) -> bool:
    """Whether a process of this machine holds the lock of the run's checkpoints. It is looked up and not tried."""
    section: Any = run.config.get("actor_rollout")
    named = section.get("save") if isinstance(section, dict) else None
    lock = (Path(named) if isinstance(named, str) else run.folder / "checkpoints") / ".lock"
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    return any(line.split()[1] == "FLOCK" and f":{inode} " in line for line in lines if len(line.split()) > 5)
