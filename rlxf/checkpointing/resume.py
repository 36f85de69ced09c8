"""Where a run goes on: the checkpoint that it takes, and whether that checkpoint is its own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlxf.checkpointing.fingerprint import fingerprint
from rlxf.checkpointing.manifest import DRIVER
from rlxf.checkpointing.rows import load_rows
from rlxf.checkpointing.run_folder import FORMAT
from rlxf.checkpointing.store import Damaged, checkpoints_folder, list_checkpoints, newest_good, require_good, step_of
from rlxf.checkpointing.waiting import load_waiting, next_to_sample
from rlxf.config.changes import SHAPE_FROM, SINCE, compare, flat
from rlxf.config.curve import changed_since
from rlxf.config.schema import RunConfig
from rlxf.core.errors import CheckpointError
from rlxf.core.files import file_sizes
from rlxf.core.jsonl import from_json
from rlxf.core.model_folder import megatron_checkpoint
from rlxf.loop.collected import Collected
from rlxf.loop.run import State
from rlxf.observe.report import Reported

log = logging.getLogger(__name__)
_LONGEST_HEADER = 10**8  # bytes, of a safetensors file


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A checkpoint that fits the recipe, and what the driver wrote into it."""

    folder: Path
    state: State
    run_folder: Path  # of the run that wrote it
    row_ids: list[int] | None  # rows of the data that the last step was made of; None: it does not say
    stream: dict[str, Any] | None = None  # where the data goes on, for ``DataSource.go_on``; None: it does not say
    reported: Reported
    baseline: dict[str, Any] | None  # what the initial policy said to the evaluation's prompts
    changes: list[str]  # of the recipe since then, that change the curve
    other_start: list[str] = field(default_factory=list)  # keys by which the recipe now starts from another policy
    waiting: list[Collected] = field(default_factory=list)  # steps that were sampled, or being sampled

    @property
    def next_step(self) -> int:
        """The first step that is not sampled; its rows are read now, or again."""
        return next_to_sample(self.state.step, self.waiting)


def initial_policy(config: RunConfig) -> str:
    """The folder of the weights that the run starts from; of a folder of checkpoints the one that is the newest now."""
    load = Path(str(config.actor_rollout.load))
    return str((megatron_checkpoint(load) or load).absolute())


def find_resume(config: RunConfig, run_dir: Path) -> Resume | None:
    """The checkpoint that ``training.resume`` asks for; None for a run that starts at the beginning.

    A damaged checkpoint, a changed recipe, another layout and a version of this program that gave the same recipe
    another curve are warned about, by name.

    Raises:
        CheckpointError: none of the checkpoints is whole, or the one that was found belongs to other data or another
            model.
    """
    root = checkpoints_folder(config.actor_rollout.save, run_dir)
    folder, damaged = _choose(config, root)
    for item in damaged:
        log.warning("damaged checkpoint: %s", item)
    if folder is None:
        return None
    driver = read_driver(folder)
    changes = _check(config, folder, driver)
    state, waiting = _state(driver), load_waiting(folder)
    state.all_failed_scores += sum(step.failed for step in waiting)
    waiting = _begin_anew(config, driver, state, waiting, folder)
    return Resume(
        folder=folder,
        state=state,
        run_folder=Path(driver.get("run_folder", run_dir)),
        row_ids=driver.get("prompt_ids"),
        stream=driver.get("stream"),
        reported=_reported(driver.get("report", {}), state, load_rows(folder)),
        baseline=driver.get("baseline"),
        changes=changes,
        other_start=_other_start(driver, config),
        waiting=waiting,
    )


# Keys that decide which weights, rows and seeds a step that is not sampled yet gets.
_OF_SAMPLES = ("rollout.lookahead", "training.global_batch_size", "training.seed")


def _begin_anew(
    config: RunConfig, driver: dict[str, Any], state: State, waiting: list[Collected], folder: Path
) -> list[Collected]:
    """The schedule of what is not sampled yet: that of the run, or one that begins here with the recipe's new values.

    Returns:
        Steps that are not sampled anew: they are trained on as they were sampled. A step that was being sampled is one
        of them, but not with new values: those apply to it.
    """
    then, now = SINCE | dict(flat(driver["config"])), dict(flat(config.dump()))
    changed = [key for key in _OF_SAMPLES if then[key] != now[key]]
    if changed:
        waiting = [step for step in waiting if step.rollouts is not None]
    ahead, last = config.rollout.lookahead, config.training.train_iters
    sampled = state.step + len(waiting)
    if not changed and sampled >= min(state.step + ahead, last):
        return waiting
    state.began = state.step
    if changed and waiting:
        log.warning(
            "%s holds %s that %s sampled ahead and will be trained on as %s sampled; the new %s from step %d on",
            folder.name,
            f"{len(waiting)} steps" if len(waiting) > 1 else "a step",
            *(("were", "they were") if len(waiting) > 1 else ("was", "it was")),
            " and ".join(changed) + (" apply" if len(changed) > 1 else " applies"),
            sampled + 1,
        )
    return waiting


def _reported(report: dict[str, Any], state: State, unwritten: dict[str, bytes]) -> Reported:
    return Reported(
        step=state.step,
        final_step=state.reported_step,
        start=from_json(report.get("start", {})),
        end=from_json(report.get("end", {})),
        seconds=report.get("seconds", 0.0),
        trackers=report.get("trackers", {}),
        unwritten=unwritten,
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
        summary = _summary(folder)
        if summary.get("steps") != step:
            continue
        if problem := _policy_problem(folder / "policy", summary.get("policy_files", {})):
            log.warning("%s: %s; it is not used", folder / "policy", problem)
        else:
            if resume.changes:
                raise CheckpointError(
                    f"{resume.folder}: that run is complete, and the recipe has changed since: "
                    f"{'; '.join(resume.changes)}; name another folder in actor_rollout.save (or hydra.run.dir) for a "
                    "new run, or raise training.train_iters to continue this one"
                )
            log.info(
                "the run is complete: %d of %d steps (%s), its policy is %s; raise training.train_iters to train more",
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
    if wanted in ("auto", "last"):  # of the run folder that `last` found
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
            f"training.resume = {folder}: this run would save beside {newer[-1]}, which is newer or another run's; "
            "set training.resume=auto to continue from it, or name another folder in actor_rollout.save"
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
        f"training.resume = {path}: no checkpoint (iter_0000010, ...) in this folder or in its subfolder `checkpoints`"
    )


def _check(config: RunConfig, folder: Path, driver: dict[str, Any]) -> list[str]:
    """Refuses what does not fit and warns of what has changed; the changes of the curve."""
    changes = compare(driver["config"], config, from_folder=driver.get(SHAPE_FROM[0]) == SHAPE_FROM[1])
    other = "name that one, or start a new run with another folder in actor_rollout.save (or hydra.run.dir)"
    if changes.shape:
        raise CheckpointError(f"{folder}: holds a model of another shape: {'; '.join(changes.shape)}; {other}")
    now, then = fingerprint(config.training_paths), driver.get("data")
    if (then or {}).get("sha256") != (now or {}).get("sha256"):
        raise CheckpointError(f"{folder}: was trained on {_data(then)}, but this run reads {_data(now)}; {other}")
    if changes.curve:
        log.warning(
            "the recipe has changed since %s: %s; the run continues with the new values, so its results change",
            folder.name,
            "; ".join(changes.curve),
        )
    if changes.layout:
        log.warning(
            "the layout has changed since %s: %s; the run continues within float tolerance, not bit for bit",
            folder.name,
            "; ".join(changes.layout),
        )
    moved = changed_since(driver.get("curve", 1), config)
    if moved and driver["step"] < config.training.train_iters and not config.training.eval_only:
        log.warning(
            "%s was written by an earlier version of this program, and these have changed since: %s; the run "
            "continues, but its results differ from those of that version",
            folder.name,
            ", ".join(moved),
        )
    return changes.curve


def _other_start(driver: dict[str, Any], config: RunConfig) -> list[str]:
    """``key old -> new`` of the keys by which the recipe starts from another policy than the checkpoint's run did."""
    then, now = driver["config"]["actor_rollout"], config.actor_rollout.model_dump(mode="json")
    if "initial_policy" in driver:  # else of an earlier version
        then, now = then | {"load": driver["initial_policy"]}, now | {"load": initial_policy(config)}
    keys = ("load", "lora_load", "qlora", "bf16", "fp16")
    changed = [key for key in keys if key in then and then[key] != now[key]]
    return [f"actor_rollout.{key} {json.dumps(then[key])} -> {json.dumps(now[key])}" for key in changed]


def _data(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no data"
    return f"{found['path']} ({found['num_bytes']} bytes, SHA-256 {found['sha256'][:12]})"


def summarised_steps(run_dir: Path) -> int:
    """The steps of a run that has ended; -1 for one that has not."""
    steps = _summary(run_dir).get("steps")
    return steps if isinstance(steps, int) else -1


def read_driver(folder: Path) -> dict[str, Any]:
    """What the driver wrote into a checkpoint. A field that an older revision did not write is not in it.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    path = folder / DRIVER
    try:
        driver = json.loads(path.read_text())
        found, config = driver.get("format"), driver.get("config")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); copy the checkpoint again, or name another one in training.resume"
        ) from error
    if found != FORMAT or config is None:
        raise CheckpointError(
            f"{folder}: written by another version of this program (format {found}, expected {FORMAT})"
        )
    content: dict[str, Any] = driver
    return content


def _state(driver: dict[str, Any]) -> State:
    """The driver's state; a field that the checkpoint does not have takes its default."""
    values = {item.name: driver[item.name] for item in fields(State) if item.name in driver}
    owed = tuple(values.get("owed", ()))
    if driver.get("unevaluated"):  # how the first version said that an evaluation was cut
        owed = ("evaluation", "row", "hf")
    return State(**{**values, "metrics": from_json(values.get("metrics", {})), "owed": owed})


def _summary(run_dir: Path) -> dict[str, Any]:
    """The summary of a run that has ended; empty if it has not ended."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _policy_problem(policy: Path, sizes: dict[str, int]) -> str | None:
    """Why a policy is not whole, as far as sizes show it; None if it is.

    Args:
        sizes: of its files when they were written; empty: an older revision did not note them.
    """
    found = file_sizes(policy)
    for name, num_bytes in sizes.items():
        if found.get(name) != num_bytes:
            return f"{name} has {found[name]} bytes, {num_bytes} were written" if name in found else f"no {name} in it"
    tensors = [name for name in found if name.endswith(".safetensors")]
    if not tensors or "config.json" not in found:
        return "holds no model"
    cut = (name for name in tensors if found[name] != _safetensors_bytes(policy / name))
    return next((f"{name} is damaged" for name in cut), None)


def _safetensors_bytes(path: Path) -> int:
    """The size that a safetensors file should have by its own header; -1 without a readable one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        ends = [int(item["data_offsets"][1]) for name, item in header.items() if name != "__metadata__"]
        return 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return -1
