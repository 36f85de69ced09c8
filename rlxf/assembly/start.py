"""What every run does before a model is loaded, whichever runtime it has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rlxf.assembly.build_run import Roles, build_run, report_settings
from rlxf.assembly.data import Data, load_data, needs_scorer, with_epochs
from rlxf.checkpointing.lock import owned_checkpoints
from rlxf.checkpointing.resume import Resume, find_resume, is_complete, policy_source
from rlxf.checkpointing.run_folder import save_config
from rlxf.checkpointing.store import checkpoints_folder, list_checkpoints
from rlxf.checkpointing.unfinished import newest_unfinished
from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.command import TYPED, Typed
from rlxf.core.disk import writing
from rlxf.core.errors import RunInterrupted
from rlxf.core.events import recorded_events
from rlxf.core.files import write_json
from rlxf.core.garbage import leave_out_what_is_loaded
from rlxf.core.stop import Stop
from rlxf.driver import train
from rlxf.evaluate import evaluate_only
from rlxf.observe.console import Screen
from rlxf.observe.diary import started
from rlxf.observe.memory import MemoryReport, ProcessMemory, driver_memory
from rlxf.observe.report import make_report
from rlxf.observe.report_process import kept_page
from rlxf.observe.trace import NAME, Trace
from rlxf.platform import Platform
from rlxf.schedule import Lanes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run whose recipe, data and checkpoint are known and fit each other."""

    config: RunConfig  # with its number of steps
    run_dir: Path
    data: Data
    resume: Resume | None  # None: it starts at the beginning


@contextmanager
def prepared(config: RunConfig, run_dir: Path, stop: Stop, typed: Typed | None) -> Iterator[Prepared | None]:
    """Take the signals over, own the run's folders, find the checkpoint and open the data; None: nothing is left to do.

    An error inside gets the command that goes on with the run as a note, if there is a checkpoint to go on from. One of
    the checks before does not: the same command would meet it again.

    Args:
        config: the recipe.
        run_dir: the run's folder; with ``training.resume=last`` the one of the run that is found takes its place.
        stop: the run's signals, for as long as the context lasts.
        typed: the command, for messages.
    """
    with stop.installed():
        with stop.interruptible(here=True):
            config, data = with_epochs(config)
            run_dir = _run_dir(config, run_dir.absolute(), typed)
        root = checkpoints_folder(config.actor_rollout.save, run_dir)
        with owned_checkpoints(root, run_dir):
            found = _prepare(config, run_dir, stop, typed, data)
            try:
                with recorded_events(run_dir), _described(found, typed):
                    yield found
            except Exception as error:
                if typed is not None and (list_checkpoints(root) or isinstance(error, RunInterrupted)):
                    error.add_note(f"to go on: {typed.going_on(run_dir)}")
                raise


def run_prepared(
    found: Prepared,
    roles: Roles,
    *,
    platform: Platform,
    clock: Clock,
    stop: Stop,
    lanes: Lanes,
    look: Callable[[], Sequence[ProcessMemory]] = driver_memory,
) -> None:
    """Train, or evaluate only, with roles whose models are loaded; ``look``: what the run's processes use."""
    earlier = found.resume.reported if found.resume else None
    report = make_report(report_settings(found.config), found.run_dir, Console(file=Screen()), earlier)
    try:
        run = build_run(
            found.config, found.run_dir, found.data, roles,
            platform=platform, report=report, clock=clock, stop=stop, lanes=lanes,
            memory=MemoryReport(look, found.config.training.train_iters), resume=found.resume,
        )  # fmt: skip
        leave_out_what_is_loaded()
        if found.config.training.eval_only:
            evaluate_only(run, policy_source(found.config, found.resume))
        else:
            train(run)
        found.data.say_dropped()
    finally:
        report.close()


def find_again(found: Prepared) -> Resume | None:
    """Where a run that has lost its trainer goes on: from its newest checkpoint, or as it began; None: at the start.

    One that only evaluates does so with the same checkpoint, whatever else is in the folder.
    """
    config, run_dir = found.config, found.run_dir
    if config.training.eval_only:
        return find_resume(config, run_dir)
    newest = config.model_copy(update={"training": config.training.model_copy(update={"resume": "auto"})})
    return find_resume(newest, run_dir) or find_resume(config, run_dir)


@contextmanager
def clocked(found: Prepared, *, role_rows: bool = False) -> Iterator[Clock]:
    """The run's clock, which with ``log.trace`` writes what it sees to the run folder.

    ``role_rows``: the roles are in this process, and have no worker that could be seen.
    """
    config = found.config
    has = {
        "train": True,
        "infer": config.samples,
        "ref": config.loads_reference,
        "reward": needs_scorer(config),
    }
    roles = [role for role, is_there in has.items() if is_there]
    if not config.log.trace:
        yield Clock(roles)
        return
    append = found.resume is not None or config.training.eval_only
    trace = Trace(found.run_dir / NAME, append=append, role_rows=role_rows)
    try:
        yield Clock(roles, trace)
    finally:
        trace.close()


@contextmanager
def _described(found: Prepared | None, typed: Typed | None) -> Iterator[None]:
    """Writes down when a run that trains starts and how it ends, and keeps its page up to date if it is to have one."""
    if found is None or found.config.training.eval_only:
        yield
        return
    config = found.config
    page = kept_page(found.run_dir) if config.log.report else nullcontext()
    diary = started(
        found.run_dir,
        step=found.resume.state.step if found.resume else 0,
        num_steps=config.training.train_iters,
        recipe=typed.config_name if typed else "",
        command=[*typed.program, *typed.arguments] if typed else [],
        device=config.training.device,
    )
    with page, diary:  # the last page shows the end
        yield


def _prepare(config: RunConfig, run_dir: Path, stop: Stop, typed: Typed | None, data: Data | None) -> Prepared | None:
    with stop.interruptible(here=True):
        resume = find_resume(config, run_dir)
        if resume is not None and is_complete(resume, config, run_dir):
            return None
        if resume is None:
            _tell_of_unfinished(config, run_dir, typed)
        data = data or load_data(config)
        with writing(run_dir, "hydra.run.dir"):
            save_config(config, run_dir)
            if typed is not None and not config.training.eval_only:
                write_json(run_dir / TYPED, {"config_name": typed.config_name, "command": str(typed)})
    return Prepared(config=config, run_dir=run_dir, data=data, resume=resume)


def _run_dir(config: RunConfig, run_dir: Path, typed: Typed | None) -> Path:
    """Where the run goes: with ``training.resume=last`` into the folder of the newest unfinished run."""
    if config.training.resume != "last":
        return run_dir
    found = newest_unfinished(config, run_dir, typed)
    if found is None:
        log.info("training.resume = last: no unfinished run of this recipe in %s; a new run starts", run_dir.parent)
        return run_dir
    log.info("training.resume = last: continuing the run in %s", found.folder)
    return found.folder


def _tell_of_unfinished(config: RunConfig, run_dir: Path, typed: Typed | None) -> None:
    """One line when a run starts anew beside one of its recipe that could go on."""
    if typed is None or config.training.eval_only or config.training.resume != "auto":
        return
    found = newest_unfinished(config, run_dir, typed)
    if found is not None:
        log.info(
            "a new run starts; an unfinished run of this recipe is in %s (%d of %d steps), to continue it: %s",
            found.folder,
            found.step,
            found.num_steps,
            typed.with_last(),
        )
