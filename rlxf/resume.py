"""Where a run goes on: the checkpoint that it takes, and whether that checkpoint is its own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlxf.checkpoint import DRIVER, Damaged, list_checkpoints, newest_good, require_good, step_of
from rlxf.config.changes import compare
from rlxf.config.schema import RunConfig
from rlxf.errors import CheckpointError
from rlxf.metrics import from_json
from rlxf.run import State
from rlxf.run_folder import FORMAT, checkpoints_folder, fingerprint, training_files
from rlxf.types import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A checkpoint that fits the recipe, and what the driver wrote into it."""

    folder: Path
    state: State
    run_folder: Path  # of the run that wrote it
    prompt_ids: list[int]  # rows of the data that the last step was made of
    start: Metrics  # of the report: the first evaluation and the first step
    end: Metrics  # and the newest ones
    baseline: dict[str, Any] | None  # what the initial policy said to the evaluation's prompts
    changes: list[str]  # of the recipe since then, that change the curve
    trackers: dict[str, str] = field(default_factory=dict)  # the run's id in each experiment tracker


def find_resume(config: RunConfig, run_dir: Path) -> Resume | None:
    """The checkpoint that ``training.resume`` asks for; None for a run that starts at the beginning.

    A damaged checkpoint, a changed recipe and another layout are warned about, by name.

    Raises:
        CheckpointError: none of the checkpoints is whole, or the one that was found belongs to other data or another
            model.
    """
    root = checkpoints_folder(config, run_dir)
    folder, damaged = _choose(config, root)
    for item in damaged:
        log.warning("damaged checkpoint: %s", item)
    if folder is None:
        return None
    driver = json.loads((folder / DRIVER).read_text())
    if driver.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: written by another version (format {driver.get('format')}, not {FORMAT})")
    changes = _check(config, folder, driver)
    return Resume(
        folder=folder,
        state=_state(driver),
        run_folder=Path(driver["run_folder"]),
        prompt_ids=driver["prompt_ids"],
        start=from_json(driver["report"]["start"]),
        end=from_json(driver["report"]["end"]),
        baseline=driver["baseline"],
        changes=changes,
        trackers=driver["report"].get("trackers", {}),
    )


def is_complete(resume: Resume, config: RunConfig, run_dir: Path) -> bool:
    """Whether nothing is left to do: every step is trained, and the policy is in its folder. Says how it is.

    Raises:
        CheckpointError: nothing is left to do, but the recipe has changed: it asks for another run.
    """
    step, steps = resume.state.step, config.training.train_iters
    if config.training.eval_only:
        log.info("evaluating %s, after %d of %d steps", resume.folder, step, steps)
        return False
    for folder in (run_dir, resume.run_folder) if step >= steps else ():
        if _summarised_steps(folder) == step and (folder / "policy").is_dir():
            if resume.changes:
                raise CheckpointError(
                    f"{resume.folder}: that run is complete, and the recipe has changed since: "
                    f"{'; '.join(resume.changes)}; name another folder in actor_rollout.save (or hydra.run.dir) for a "
                    "new run, or raise training.train_iters to go on with this one"
                )
            log.info(
                "the run is complete: %d of %d steps (%s), its policy is %s; raise training.train_iters to go on",
                step,
                steps,
                resume.folder,
                folder / "policy",
            )
            return True
    log.info("resumed from %s: %d of %d steps are done", resume.folder, step, steps)
    return False


def policy_source(config: RunConfig, resume: Resume | None) -> Path:
    """Where the weights of a run that begins now come from: its checkpoint, or the model folder."""
    return resume.folder if resume else Path(str(config.actor_rollout.load))


def _choose(config: RunConfig, root: Path) -> tuple[Path | None, list[Damaged]]:
    wanted = config.training.resume
    if wanted == "auto":
        return newest_good(root)
    earlier = list_checkpoints(root)
    if wanted == "never":
        if earlier:
            raise CheckpointError(
                f"{root}: holds {earlier[-1].name} of an earlier run, and training.resume = never; name another folder "
                "in actor_rollout.save (or hydra.run.dir), or set training.resume=auto to go on"
            )
        return None, []
    folder, damaged = _named(Path(wanted))
    newer = [other for other in earlier if other.parent != folder.parent or step_of(other) > step_of(folder)]
    if newer and not config.training.eval_only:
        raise CheckpointError(
            f"training.resume = {folder}: {newer[-1]} is there, too, and would be mixed with what comes now; set "
            "training.resume=auto to go on from it, or name another folder in actor_rollout.save"
        )
    return folder, damaged


def _named(path: Path) -> tuple[Path, list[Damaged]]:
    """The checkpoint that a path means: itself, or the newest of a folder of checkpoints or of a run."""
    if step_of(path) >= 0 or (path / DRIVER).is_file():
        require_good(path)
        return path, []
    for root in (path, path / "checkpoints"):
        folder, damaged = newest_good(root)
        if folder is not None:
            return folder, damaged
    raise CheckpointError(
        f"training.resume = {path}: holds no checkpoint (iter_0000010, ...), nor does `checkpoints` in it"
    )


def _check(config: RunConfig, folder: Path, driver: dict[str, Any]) -> list[str]:
    """Refuses what does not fit and warns of what has changed; the changes of the curve."""
    changes = compare(driver["config"], config)
    other = "name that one, or start a new run with another folder in actor_rollout.save (or hydra.run.dir)"
    if changes.shape:
        raise CheckpointError(f"{folder}: holds a model of another shape: {'; '.join(changes.shape)}; {other}")
    now, then = fingerprint(*training_files(config)), driver["data"]
    if (then or {}).get("sha256") != (now or {}).get("sha256"):
        raise CheckpointError(f"{folder}: was trained on {_data(then)}, but this run reads {_data(now)}; {other}")
    if changes.curve:
        log.warning(
            "the recipe has changed since %s: %s; the run goes on, but not as the one before would have",
            folder.name,
            "; ".join(changes.curve),
        )
    if changes.layout:
        log.warning(
            "the layout has changed since %s: %s; the run goes on to float tolerance, not bit for bit",
            folder.name,
            "; ".join(changes.layout),
        )
    return changes.curve


def _data(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no data"
    return f"{found['path']} ({found['num_bytes']} bytes, SHA-256 {found['sha256'][:12]})"


def _state(driver: dict[str, Any]) -> State:
    values = {item.name: driver[item.name] for item in fields(State) if item.name in driver}  # else the default
    return State(**{**values, "metrics": from_json(values["metrics"])})


def _summarised_steps(run_dir: Path) -> int:
    """The steps of a run that has ended; -1 for one that has not."""
    try:
        return int(json.loads((run_dir / "summary.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
