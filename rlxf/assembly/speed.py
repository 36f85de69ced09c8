"""How fast a run is, beside its plan: ``speed/*`` and ``plan/*`` of its rows, and ``plan.json``. It ends no run."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rlxf.assembly.planning import run_device
from rlxf.config.schema import RunConfig
from rlxf.core.disk import writing
from rlxf.core.errors import DiskError
from rlxf.core.files import write_json, write_text
from rlxf.core.types import Metrics
from rlxf.loop.speed import Speed, no_speed
from rlxf.planner.calibrate import calibrated, device_text
from rlxf.planner.device import Device
from rlxf.planner.estimate import Estimate, estimate
from rlxf.planner.jobs import Jobs, jobs_of
from rlxf.planner.measured import (
    StepWork,
    busy,
    compare,
    median_seconds,
    planned_seconds,
    speeds,
    work_of_row,
)
from rlxf.planner.record import NAME, Measured, measured_memory, record, table
from rlxf.platform import Platform

log = logging.getLogger(__name__)

ROWS = (2, 3)  # of this process, that are compared with the plan: the first one warms up
_NO_PLAN = "the run goes on without %s: %s"


def start_speed(config: RunConfig, run_dir: Path, platform: Platform, num_tokens: int) -> Speed:
    """Plan the run, write ``plan.json``, and return what gives its rows their ``speed/*`` and ``plan/*``.

    Whatever fails here is one line of the log, and the run has fewer numbers. A run that only evaluates has no rows.

    Args:
        config: the recipe.
        run_dir: the run's folder.
        platform: of its devices.
        num_tokens: that were trained on before this process.
    """
    if config.training.eval_only:
        return no_speed
    try:
        jobs = jobs_of(config)
    except Exception as error:  # noqa: BLE001  an estimate must not end a run
        log.warning(_NO_PLAN, "speed/* and its plan", _line(error))
        return no_speed
    timed = replace(jobs, reference=None) if config.ref.precompute_ref_log_probs else jobs  # it is asked beforehand
    plan, exact = None, False
    try:
        device, exact = run_device(config, platform)
        plan = estimate(jobs, device, price=config.plan.price)
        if timed != jobs:
            plan = replace(estimate(timed, device, price=config.plan.price), memory=plan.memory)
        if problems := plan.shortages():
            log.warning("by an estimate, memory does not suffice: %s (%s)", "; ".join(problems), run_dir / NAME)
        _save(run_dir, plan)
    except Exception as error:  # noqa: BLE001  an estimate must not end a run
        log.warning(_NO_PLAN, "a plan", _line(error))
    return _Speed(timed, plan, run_dir, num_tokens=num_tokens, exact=exact, calibrate=config.plan.calibrate)


def _save(run_dir: Path, plan: Estimate, measured: Measured | None = None) -> None:
    try:
        with writing(run_dir, "hydra.run.dir"):
            write_json(run_dir / NAME, record(plan, measured))
    except DiskError as error:
        log.warning(_NO_PLAN, f"a new {NAME}", _line(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """A row that is compared with the plan."""

    step: int
    row: Metrics
    work: StepWork


class _Speed:
    """Sees each row once."""

    def __init__(
        self,
        jobs: Jobs,
        plan: Estimate | None,
        run_dir: Path,
        *,
        num_tokens: int,
        exact: bool,
        calibrate: str | None,
    ) -> None:
        self._jobs, self._plan, self._run_dir = jobs, plan, run_dir
        self._tokens, self._exact, self._calibrate = float(num_tokens), exact, calibrate
        self._cores = int(os.environ.get("OMP_NUM_THREADS", "1")) if plan and plan.device.is_cpu else 1
        self._rows = 0
        self._kept: list[_Kept] = []
        self._ratios: Metrics = {}
        self._failed = False

    def __call__(self, step: int, row: Metrics) -> Metrics:
        if self._failed:
            return {}
        try:
            return self._numbers(step, row)
        except Exception as error:  # noqa: BLE001  an estimate must not end a run
            self._failed = True
            log.warning(_NO_PLAN, "speed/* and plan/*", _line(error))
            return {}

    def _numbers(self, step: int, row: Metrics) -> Metrics:
        new_tokens, self._tokens = row["num_tokens"] - self._tokens, row["num_tokens"]
        work = work_of_row(self._jobs, row, new_tokens)
        if work is None:
            return {}
        self._rows += 1
        if self._rows in ROWS:
            self._kept.append(_Kept(step=step, row=row, work=work))
        if self._rows == ROWS[-1] and self._plan is not None:
            self._compare(self._plan)
        device = self._plan.device if self._plan is not None else None
        stages = work.stages(self._jobs, device) if device is not None else {}
        exact = device if self._exact else None
        fast = speeds(self._jobs, row, work, stages, exact, cores=self._cores)
        return fast | busy(self._jobs, row) | self._ratios

    def _compare(self, plan: Estimate) -> None:
        """Planned against measured, once."""
        rows, works = [kept.row for kept in self._kept], [kept.work for kept in self._kept]
        seconds = median_seconds(rows)
        found = Measured(
            steps=tuple(kept.step for kept in self._kept),
            work=works[-1].trained or works[-1].sampled,
            seconds=compare(planned_seconds(self._jobs, plan.device, works), seconds),
            memory=measured_memory(plan, rows),
        )
        self._ratios = found.ratios
        steps = " and ".join(map(str, found.steps))
        log.info("planned (an estimate) and measured, medians of steps %s:\n%s", steps, table(found))
        _save(self._run_dir, plan, found)
        if self._calibrate is None:
            return
        try:
            self._write_device(plan.device, works, seconds, Path(self._calibrate))
        except Exception as error:  # noqa: BLE001  the run itself is well
            log.warning(_NO_PLAN, self._calibrate, _line(error))

    def _write_device(self, device: Device, works: list[StepWork], seconds: Metrics, path: Path) -> None:
        source = f"measured by {self._run_dir.name}, step {self._kept[-1].step}"
        fitted = calibrated(
            device,
            lambda other: planned_seconds(self._jobs, other, works),
            seconds,
            source=source,
            date=time.strftime("%Y-%m-%d"),
        )
        with writing(path, "plan.calibrate"):
            write_text(path, device_text(fitted, f"{device.name}, {source}."))
        log.info("plan.calibrate: the figures of these devices are in %s", path)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
