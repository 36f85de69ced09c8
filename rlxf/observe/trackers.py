"""Experiment trackers: the numbers of a run in Weights & Biases, MLflow or SwanLab, besides its own files.

Each package is imported when its tracker starts, since none of them is needed for anything else.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlxf.config.kinds import Tracker
from rlxf.config.schema import LogConfig
from rlxf.core.errors import ConfigError, RlxfError
from rlxf.core.types import Metrics

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 600  # longest wait for an upload when a run ends
Recipe = dict[str, Any]  # as plain data: what ``config.yaml`` of a run folder holds
_MLFLOW_BATCH = 100  # parameters that MLflow takes in one request


class TrackerRun(Protocol):
    """One run in a tracker."""

    id: str  # by which a resumed run finds it again

    def log(self, step: int, metrics: Metrics) -> None:
        """Add numbers, all of them finite."""
        ...

    def finish(self, *, complete: bool) -> None: ...


class TrackerSink:
    """Writes a run's numbers to a tracker. If a tracker fails later, a warning reports it and the run continues.

    Raises:
        ConfigError: the tracker could not be started.
    """

    def __init__(
        self, name: Tracker, log_config: LogConfig, recipe: Recipe, run_dir: Path, run_id: str | None = None
    ) -> None:
        """``recipe``: as the tracker shows it. ``run_id``: the tracker's run that a resumed run continues."""
        self.name = name
        self._failures = 0
        self._closed = False
        try:
            with _signals_kept():
                self._run = _START[name](log_config, recipe, run_dir, run_id)
        except RlxfError:
            raise  # a stop that the user asked for
        except Exception as error:
            raise ConfigError(
                f"log.report_to: {name} could not be started: {type(error).__name__}: {error}; {_HELP[name]}, or leave "
                f"{name} out"
            ) from error

    @property
    def run_id(self) -> str:
        return self._run.id

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the finite numbers: trackers cannot draw others."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._guarded(lambda: self._run.log(step, finite))

    def close(self, *, complete: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self._guarded(lambda: self._run.finish(complete=complete))
        if self._failures > 1:
            log.warning("%s: %d calls failed; metrics.jsonl has every number", self.name, self._failures)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RlxfError:
            raise  # a stop that the user asked for
        except Exception as error:  # noqa: BLE001 - hours of training outweigh a dashboard
            if not self._failures:
                log.warning(
                    "%s: %s: %s; the run continues without this tracker", self.name, type(error).__name__, error
                )
            self._failures += 1


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the run's Ctrl-C handler, which SwanLab replaces: it ends the run after a whole step, with a checkpoint."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


class WandbRun:
    """``wandb``; with ``WANDB_MODE=offline`` nothing is sent, and ``wandb sync`` sends it later."""

    def __init__(self, config: LogConfig, recipe: Recipe, run_dir: Path, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=config.run_name or run_dir.name,
            dir=str(run_dir),
            config=recipe,
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_TIMEOUT_S),
        )
        self.id = str(self._run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def finish(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class MlflowRun:
    """MLflow at ``MLFLOW_TRACKING_URI``; unset: files in ``mlruns`` of the run folder."""

    def __init__(self, config: LogConfig, recipe: Recipe, run_dir: Path, run_id: str | None) -> None:
        # MLflow 3 refuses its file store unless this is set; the light package has no other store of its own.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self.id = self._go_on(run_id) if run_id else self._start(config, recipe, run_dir)

    def _start(self, config: LogConfig, recipe: Recipe, run_dir: Path) -> str:
        from mlflow.entities import Param

        project = config.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        run = self._client.create_run(experiment, run_name=config.run_name or run_dir.name)
        run_id = str(run.info.run_id)
        parameters = [Param(key, str(value)) for key, value in _flat(recipe)]
        for start in range(0, len(parameters), _MLFLOW_BATCH):
            self._client.log_batch(run_id, params=parameters[start : start + _MLFLOW_BATCH])
        return run_id

    def _go_on(self, run_id: str) -> str:
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def finish(self, *, complete: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if complete else "FAILED")


class SwanlabRun:
    """``swanlab``; with ``SWANLAB_MODE=offline`` nothing is sent, and ``swanlab sync`` sends it later."""

    def __init__(self, config: LogConfig, recipe: Recipe, run_dir: Path, run_id: str | None) -> None:
        import swanlab

        self._run = swanlab.init(
            project=config.project,
            name=config.run_name or run_dir.name,
            log_dir=str(run_dir / "swanlab"),
            config=recipe,
            mode=os.environ.get("SWANLAB_MODE"),
            id=run_id,
            resume="allow" if run_id else None,
            reinit=True,
        )
        self.id = str(self._run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def finish(self, *, complete: bool) -> None:
        self._run.finish(state="success" if complete else "aborted")


_START: dict[str, Callable[[LogConfig, Recipe, Path, str | None], TrackerRun]] = {
    "wandb": WandbRun,
    "mlflow": MlflowRun,
    "swanlab": SwanlabRun,
}
_HELP = {
    "wandb": "log in (`wandb login`) or set WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI",
    "swanlab": "log in (`swanlab login`) or set SWANLAB_MODE=offline",
}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of every key."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
