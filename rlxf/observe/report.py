"""What a run reports to its user and into files: progress line, metrics, final table and ``summary.json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rlxf.config.schema import LogConfig, TrainingConfig
from rlxf.config.stages import STAGES
from rlxf.core.disk import patient, writing
from rlxf.core.errors import UnhealthyRun
from rlxf.core.files import file_sizes, write_json
from rlxf.core.jsonl import Row, finite_or_null
from rlxf.core.kept_file import KeptFile
from rlxf.core.types import Metrics
from rlxf.health import Health, Verdict, facts_of
from rlxf.observe.console import Progressbar, duration, final_table
from rlxf.observe.diary import Diary
from rlxf.observe.formulas import read_jsonl
from rlxf.observe.report_process import NAME as PAGE
from rlxf.observe.rows import table_rows
from rlxf.observe.sinks import JsonlSink, Sink, TensorBoardSink
from rlxf.observe.trackers import Recipe, TrackerSink


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """What the earlier processes of a resumed run have reported, as its checkpoint holds it."""

    step: int  # complete driver steps
    final_step: int  # the last one whose row in the run's files is final
    start: Metrics = field(default_factory=dict)  # the first evaluation and the first step
    end: Metrics = field(default_factory=dict)  # the newest ones
    seconds: float = 0.0  # that the run had taken; 0 in checkpoints of the first version
    trackers: Mapping[str, str] = field(default_factory=dict)  # the run's id in each experiment tracker
    unwritten: Mapping[str, bytes] = field(default_factory=dict)  # rows that the disk did not take, by file


NOTHING_REPORTED = Reported(step=0, final_step=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSettings:
    """What a report must know of its run."""

    training: TrainingConfig
    log: LogConfig
    has_penalty: bool  # completions can lose some of their score, such as those without EOS
    recipe: Recipe  # for trackers, and what verdicts must know
    stop_on: Sequence[str] = ()  # verdicts that end the run


class RunReport:
    """Everything that a run prints and writes about itself."""

    def __init__(
        self,
        settings: ReportSettings,
        run_dir: Path,
        sinks: Sequence[Sink],
        console: Console,
        earlier: Reported | None = None,
    ) -> None:
        training = settings.training
        after = earlier.final_step if earlier else None
        earlier = earlier or NOTHING_REPORTED
        self._run_dir = run_dir
        self._diary = Diary(run_dir)
        self._sinks = sinks
        if training.eval_only:
            after = sys.maxsize  # the run may have later rows: cut none of them
        evaluates = training.eval_interval > 0 or training.eval_only
        rows = b"" if training.eval_only else earlier.unwritten.get("eval.jsonl", b"")
        self._evaluations = JsonlSink(run_dir / "eval.jsonl", after=after, unwritten=rows) if evaluates else None
        self._files = [sink.file for sink in (*sinks, self._evaluations) if isinstance(sink, JsonlSink)]
        self._console = console
        stage = STAGES[training.stage]
        self._only = training.eval_only
        self._title = stage.title
        self._product = "reward model" if stage.objective == "reward" else "policy"
        self._online = stage.online
        self._has_penalty = settings.has_penalty
        self._num_steps = training.train_iters
        self._bar = Progressbar(console, earlier.step, self._num_steps, settings.log.interval)
        self._started = time.monotonic()
        self._seconds_before = 0.0 if training.eval_only else earlier.seconds
        self._step = earlier.step
        self._start: Metrics = dict(earlier.start)  # the first evaluation and the first step
        self._end: Metrics = dict(earlier.end)  # the newest ones
        self._measured: Metrics = {}  # by this process before its first step
        self._health = Health(facts_of(settings.recipe))
        self._stop_on = settings.stop_on
        self._has_page = settings.log.report and not training.eval_only
        self._answers: tuple[int, list[Row]] | None = None  # of the newest evaluation, and after how many steps

    def describe(self) -> dict[str, Any]:
        """What the report of a resumed run needs, as JSON data."""
        trackers = {sink.name: sink.run_id for sink in self._sinks if isinstance(sink, TrackerSink)}
        return {
            "start": finite_or_null(self._start),
            "end": finite_or_null(self._end),
            "trackers": trackers,
            "seconds": round(self._seconds(), 3),
        }

    def keep(self, files: Sequence[KeptFile]) -> None:
        """Take care of more files of rows, as of the report's own."""
        self._files += files

    def unwritten(self) -> dict[str, bytes]:
        """Rows that the disk does not take now, by the name of their file."""
        return {file.path.name: rows for file in self._files if (rows := file.unwritten)}

    def _seconds(self) -> float:
        """Seconds that the run has taken so far, those before it was resumed included."""
        return self._seconds_before + time.monotonic() - self._started

    def answered(self, step: int, answers: list[Row]) -> None:
        """What the policy says at the evaluation after ``step`` steps, for its row of ``eval.jsonl``."""
        self._answers = step, answers

    def remember(self, rows: Sequence[Row], evaluations: Sequence[Row]) -> None:
        """What the earlier processes of a resumed run saw, so that verdicts go on from there."""
        self._health.restore(rows, evaluations)

    def require_health(self) -> None:
        """Whether the run may go on.

        Raises:
            UnhealthyRun: a verdict of ``health.stop_on`` has held.
        """
        for verdict in self._health.verdicts:
            if verdict.name in self._stop_on:
                raise UnhealthyRun(
                    f"health.stop_on: {verdict.name} holds since step {verdict.step}: {verdict.seen}. "
                    f"{verdict.advice} See {verdict.anchor}. To go on all the same, take {verdict.name} out of "
                    "health.stop_on"
                )

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """The evaluation before the first step, empty if none was due; later ones come with their step's metrics."""
        for sink in self._sinks:
            if metrics and not isinstance(sink, JsonlSink):  # metrics.jsonl holds steps only
                sink.write(step, metrics)
        self._measured = metrics
        self._keep(step, metrics)
        if not self._only:
            self._tell(step, self._health.add_evaluation(step, metrics))
        self._bar.begin()

    def stepped(self, step: int, metrics: Metrics) -> None:
        self._step = step
        for sink in self._sinks:
            sink.write(step, metrics)
        self._keep(step, metrics)
        self._bar.show(step, metrics)
        self._tell(step, self._health.add(step, metrics))

    def _tell(self, step: int, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self._diary.write("verdict", step, name=verdict.name, seen=verdict.seen)
            self.say(f"step {step}: {_line(verdict)}")

    def saved(self, folder: Path) -> None:
        step = folder.name.rpartition("_")[2]  # its name ends with it
        self._diary.write("checkpoint", int(step) if step.isdigit() else self._step, folder=str(folder))
        self.say(f"checkpoint: {folder}")

    def finished(self, policy: Path) -> None:
        """Print the final table and write ``summary.json``.

        Raises:
            DiskError: the disk takes neither the last rows nor the summary.
        """
        for file in self._files:
            patient(file.flush)
        self.close(complete=True)
        seconds = self._seconds()
        summary = {
            "steps": self._step,
            "seconds": round(seconds, 3),
            "policy": str(policy),
            # A resumed run writes the policy again if its files have changed.
            **({} if self._only else {"policy_files": file_sizes(policy)}),
            "start": finite_or_null(self._start),
            "end": finite_or_null(self._end),
            **({} if self._only else {"verdicts": [asdict(verdict) for verdict in self._health.verdicts]}),
        }
        patient(lambda: self._write_summary(summary))
        done = f"evaluated after {self._step} steps" if self._only else f"{self._step} steps"
        title = f"{self._title}: {done} in {duration(seconds)}"
        rows = table_rows(self._end, online=self._online, has_penalty=self._has_penalty)
        columns = {"value": self._measured} if self._only else {"start": self._start, "end": self._end}
        self._console.print(final_table(title, rows, columns))
        for verdict in () if self._only else self._health.verdicts:
            self.say(f"steps {verdict.step} to {verdict.last}: {_line(verdict)}")
        self.say(f"{self._product}: {policy}")
        if self._has_page:
            self.say(f"report: {self._run_dir / PAGE}")
        self.say(f"run folder: {self._run_dir}")

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        path = self._run_dir / "summary.json"
        with writing(path, "hydra.run.dir"):
            write_json(path, summary)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self, *, complete: bool = False) -> None:
        """End the progress line and flush every file; may be called twice. ``complete``: the run is at its end."""
        self._bar.close()
        for sink in self._sinks:
            sink.close(complete=complete)
        for file in self._files:
            file.close()

    def _keep(self, step: int, metrics: Metrics) -> None:
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        first = metrics
        if any(name.startswith("eval/") for name in self._start):  # only the first evaluation is the start
            first = {name: value for name, value in metrics.items() if name not in evaluation}
        self._start = first | self._start
        self._end = self._end | metrics
        if evaluation and self._evaluations is not None:
            answers = self._answers
            shown = {"answers": answers[1]} if answers is not None and answers[0] == step else {}
            self._evaluations.write(step, evaluation, **shown)


def make_report(
    settings: ReportSettings, run_dir: Path, console: Console, earlier: Reported | None = None
) -> RunReport:
    """The report that a recipe asks for. Files and trackers of a resumed run continue after the step of its checkpoint.

    Raises:
        ConfigError: a tracker could not be started.
    """
    after = earlier.final_step if earlier else None
    logs, trains = settings.log, not settings.training.eval_only
    name = "metrics.jsonl"
    rows = earlier.unwritten.get(name, b"") if earlier else b""
    sinks: list[Sink] = [JsonlSink(run_dir / name, after=after, unwritten=rows)] if trains else []
    if logs.tensorboard or "tensorboard" in logs.report_to:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", after=after if trains else None))
    ids = earlier.trackers if earlier and trains else {}  # eval_only is a run of its own in a tracker
    for name in dict.fromkeys(logs.report_to):
        if name != "tensorboard":
            sinks.append(TrackerSink(name, logs, settings.recipe, run_dir, ids.get(name)))
    report = RunReport(settings, run_dir, sinks, console, earlier)
    if earlier is not None and trains:
        report.remember(_rows(run_dir / "metrics.jsonl"), _rows(run_dir / "eval.jsonl"))
    return report


def _line(verdict: Verdict) -> str:
    return f"{verdict.title}: {verdict.seen}. {verdict.advice} ({verdict.anchor})"


def _rows(path: Path) -> list[Row]:
    """The rows of a file that the sinks have cut already; none if it is not there, or cannot be read."""
    try:
        return read_jsonl(path)
    except (OSError, ValueError):
        return []
