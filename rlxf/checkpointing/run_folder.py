"""What a run leaves on disk: checkpoints, the policy as a Hugging Face folder, config."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rlxf.checkpointing.fingerprint import fingerprint
from rlxf.checkpointing.manifest import DRIVER, write_manifest
from rlxf.checkpointing.rolling import drop_rolling, mark_rolling, rolling_steps
from rlxf.checkpointing.store import (
    BEST,
    BEST_REASON,
    LATEST,
    best,
    checkpoints_folder,
    folder_of,
    list_checkpoints,
    metric_of,
    num_bytes,
    prune,
    step_of,
)
from rlxf.config.curve import CURVE
from rlxf.config.roles import LoraConfig
from rlxf.config.schema import RunConfig
from rlxf.core.disk import disk_error, explain, is_lasting, patient, writing
from rlxf.core.errors import CheckpointError, SaveError
from rlxf.core.events import event
from rlxf.core.files import (
    fsync,
    publish,
    temporary_for,
    write_json,
    write_text,
)
from rlxf.core.jsonl import finite_or_null
from rlxf.core.waiting import in_thread
from rlxf.loop.run import UNSAVED, Actor, State
from rlxf.observe.console import with_error

log = logging.getLogger(__name__)

FORMAT = 1  # of driver.json
AGAIN_S = 60.0  # after a checkpoint that could not be written, until the next try


@dataclass(slots=True)
class Saving:
    """A checkpoint on its way."""

    folder: Path
    temporary: Path
    rolling: bool = False  # the next checkpoint replaces it
    published: Future[None] | None = None  # None: the actor is still writing
    since: float = 0.0  # when a thread began to publish it


class RunFolder:
    """The folders of one run. A checkpoint is complete or not there: temporary folder, fsync, manifest, rename.

    The run waits while the actor writes its state. A thread hashes and renames it and deletes old checkpoints, while
    the next step is sampled: nothing of that needs a device.

    Args:
        config: the recipe.
        run_dir: the run's folder.
        actor: who writes parameters and optimizer state.
        describe: what else a resumed run needs, for ``driver.json``.
        saved: told of each complete checkpoint.
        also: writes what a resumed run needs besides the actor's state into a checkpoint's folder.
        resumed: the checkpoint that the run goes on from.
        now: seconds of a clock that only goes forward.
        sleep: waits, in seconds.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        actor: Actor,
        *,
        describe: Callable[[State], dict[str, Any]] = lambda state: {},
        saved: Callable[[Path], None] = lambda folder: None,
        also: Callable[[Path, State], None] = lambda folder, state: None,
        resumed: Path | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self._config = config
        self._run_dir = run_dir
        self._checkpoints = checkpoints_folder(config.actor_rollout.save, run_dir)
        self._actor = actor
        self._describe = describe
        self._saved = saved
        self._also = also
        # Now and not in the first save, which a stop signal may be waiting for.
        self._data = fingerprint(config.training_paths)
        self._newest = resumed
        self._now = now
        self._saved_at = now()
        self._failed_at: float | None = None  # the newest try, if no checkpoint has been written since
        self._num_failed = 0  # due checkpoints in a row that could not be written
        self._saving: Saving | None = None
        self._near: list[Path] = []  # the best checkpoint and the next one, told to be as good as each other
        self._require_space()

    def save_checkpoint(self, state: State) -> None:
        """``<checkpoints>/iter_0000020`` after 20 steps: what the actor writes, and ``driver.json``. Not twice.

        Returns when it is complete; with ``training.async_save`` when the state is copied, and ``wait`` does the rest.
        While the disk takes nothing, it is tried again for half a minute.

        Raises:
            SaveError: there is not enough space, or it could not be written; those before are untouched.
            CheckpointError: the run's state cannot be written.
        """
        try:
            self.wait()  # never two at a time
        except SaveError as error:
            log.warning("%s", error)  # the one that follows takes its place
        self._save_once(state)
        if not self._config.training.async_save:
            self.wait()

    def save_due(self, state: State) -> None:
        """The same in the middle of a run, which goes on without a checkpoint or two.

        Returns when the actor has written its state, and ``published`` does the rest; with ``training.async_save`` when
        the state is copied, and ``poll`` does the rest.

        Raises:
            SaveError: more than ``training.max_failed_saves`` in a row could not be written.
            CheckpointError: as above.
        """
        self._go_on(wait=True)
        try:
            self._save_once(state)
        except SaveError as error:
            self._missed(error, rolling=False)

    def _save_once(self, state: State) -> None:
        if self._newest is not None and step_of(self._newest) == state.step:
            self._keep(state.step)
        else:
            patient(lambda: self._save(state, rolling=False), sleep=self._sleep)

    def is_time_to_save(self, state: State) -> bool:
        """Whether ``training.save_every_minutes`` have passed since the last checkpoint; never after the last step.

        Also a minute after a checkpoint that could not be written.
        """
        training = self._config.training
        minutes, is_last = training.save_every_minutes, state.step >= training.train_iters
        if self._failed_at is not None:
            return not is_last and self._now() - self._failed_at >= AGAIN_S
        return minutes > 0 and not is_last and self._now() - self._saved_at >= 60 * minutes

    def save_in_time(self, state: State) -> None:
        """The same after ``training.save_every_minutes`` without a checkpoint; the next one of any kind replaces it.

        Nobody asked for this one, so the run goes on if it cannot be written.
        """
        if not self.is_time_to_save(state):
            return
        self._go_on(wait=True)
        try:
            self._save(state, rolling=True)
        except SaveError as error:
            self._missed(error, rolling=True)

    def _missed(self, error: SaveError, *, rolling: bool) -> None:
        """A checkpoint could not be written: the run goes on, or has missed too many that were due."""
        if rolling:
            if self._failed_at is None:  # told once
                minutes = self._config.training.save_every_minutes
                self._tell(f"{error} (training.save_every_minutes = {minutes:g}; 0 = off)")
            self._failed_at = self._now()
            return
        self._num_failed += 1
        self._failed_at = self._now()
        limit = self._config.training.max_failed_saves
        in_a_row = f"{self._num_failed} in a row, training.max_failed_saves = {limit}"
        if self._num_failed > limit:
            raise SaveError(f"{error} ({in_a_row})", lasting=True) from error
        self._tell(f"{error} ({in_a_row}); the run goes on, and tries again in a minute")

    def _tell(self, message: str) -> None:
        log.warning("%s", message, extra=event("not saved", who=self._checkpoints.name))

    def _keep(self, step: int) -> None:
        """A rolling checkpoint of that step stays."""
        with self._saving_errors():
            mark_rolling(self._checkpoints, rolling_steps(self._checkpoints) - {step})

    def _save(self, state: State, *, rolling: bool) -> None:
        self._require_space()
        background, root = self._config.training.async_save, self._checkpoints
        folder = folder_of(root, state.step)
        with self._discarded_on_failure():
            self._saving = Saving(folder, temporary_for(folder), rolling)
            # Before it has its name: what is not marked stays for ever.
            earlier = rolling_steps(root) - {state.step}
            mark_rolling(root, earlier | {state.step} if rolling else earlier)
            self._actor.save_checkpoint(self._saving.temporary, background)
            self._also(self._saving.temporary, state)
            write_json(self._saving.temporary / DRIVER, self._driver(state))
            self._saved_at = self._now()
            if not background:
                self._start_publishing(self._saving)

    def newest(self) -> Path | None:
        """The newest complete checkpoint: of this run, or the one that it goes on from."""
        return self._newest

    def finish(self, *, ask_actor: bool) -> None:
        """For a run that failed: publish the checkpoint that is being written if it is whole, or drop it.

        It never raises.

        Args:
            ask_actor: wait for the actor to write the rest; else only what is fully written is published.
        """
        try:
            if self._saving is not None and self._saving.published is None and not ask_actor:
                folder = self._saving.folder
                self._discard()
                raise CheckpointError(f"{folder}: the actor could not finish writing it")
            self.wait()
        except Exception as error:  # noqa: BLE001  the run has failed already, and that is what is told
            log.warning("the checkpoint that was being written is lost: %s", error)

    def poll(self) -> None:
        """Finish a checkpoint that has been written in the background, without waiting.

        Raises:
            SaveError: as ``save_due`` does.
            CheckpointError: it is being published for longer than ``training.stage_timeout_s``.
        """
        self._go_on(wait=False)

    @property
    def is_publishing(self) -> bool:
        """Whether a checkpoint that the actor has written has no name yet, and the next update must wait for it.

        ``training.async_save`` lets updates go on.
        """
        return self._saving is not None and not self._config.training.async_save

    def published(self) -> None:
        """Return when no checkpoint ``is_publishing``.

        Raises:
            SaveError, CheckpointError: as ``poll`` does.
        """
        if self.is_publishing:
            self._go_on(wait=True)

    def _go_on(self, *, wait: bool) -> None:
        """Finish what is being written, if there is something; if it fails, the run may go on without it."""
        rolling = self._saving is not None and self._saving.rolling
        try:
            self._advance(wait=wait)
        except SaveError as error:
            self._missed(error, rolling=rolling)

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        self._advance(wait=True)

    def _advance(self, *, wait: bool) -> None:
        saving = self._saving
        if saving is None:
            return
        with self._discarded_on_failure():
            if saving.published is None and self._actor.checkpoint_written(wait):
                self._start_publishing(saving)
            if saving.published is not None and (wait or saving.published.done() or not self._seconds_left(saving)):
                self._finish_publishing(saving)

    def _start_publishing(self, saving: Saving) -> None:
        """In a thread: hashing takes its time, and a disk that hangs must not keep the process alive."""
        saving.since = self._now()
        saving.published = in_thread(lambda: self._publish(saving), "publish")

    def _seconds_left(self, saving: Saving) -> float:
        """Until a checkpoint that is being published counts as one that the disk never takes."""
        return max(0.0, saving.since + self._config.training.stage_timeout_s - self._now())

    def _finish_publishing(self, saving: Saving) -> None:
        assert saving.published is not None
        limit = self._config.training.stage_timeout_s
        try:
            saving.published.result(timeout=self._seconds_left(saving))
        except FutureTimeout as error:
            if saving.published.done():  # the disk's own words
                raise
            self._saving = None  # its thread is still at it: nothing of it is touched
            raise CheckpointError(
                f"{saving.folder}: was not written within {limit} s; check the disk, or raise "
                "training.stage_timeout_s. Earlier checkpoints are unchanged"
            ) from error
        self._complete()

    def _publish(self, saving: Saving) -> None:
        """All of it that nobody waits for, in a thread; nothing else touches the folder of checkpoints meanwhile."""

        def write() -> None:
            with self._saving_errors():
                if saving.temporary.exists():  # else an earlier try has given it its name
                    self._sync_logs()
                    write_manifest(saving.temporary)
                    publish(saving.temporary, saving.folder)
                write_text(self._checkpoints / LATEST, f"{step_of(saving.folder)}\n")

        patient(write, sleep=self._sleep)
        self._replace_earlier(saving)

    def _complete(self) -> None:
        assert self._saving is not None
        saving, self._saving = self._saving, None
        self._newest = saving.folder
        self._failed_at, self._num_failed = None, 0
        self._saved(saving.folder)

    def _replace_earlier(self, saving: Saving) -> None:
        """Delete the checkpoints in whose place this one is."""
        step = step_of(saving.folder)
        try:
            drop_rolling(self._checkpoints, but=step)
            mark_rolling(self._checkpoints, {step} if saving.rolling else ())
        except OSError as error:  # the run does not depend on it
            log.warning("an old checkpoint could not be deleted: %s", error)
        self.prune(step)

    def prune(self, step: int) -> None:
        """Delete the checkpoints up to ``step`` that are not kept; at the start those that a killed run did not."""
        training, root = self._config.training, self._checkpoints
        metric, largest = self._config.best_metric
        rolling = rolling_steps(root)
        try:
            if training.keep_latest:
                count = training.keep_best
                kept = best(root, metric, count, largest=largest, ignore=rolling) if count else []
                prune(root, training.keep_latest, newest=step, keep=frozenset(kept), ignore=rolling)
            self._point_to_best(metric, step, largest=largest)
        except OSError as error:  # the run does not depend on it
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _point_to_best(self, metric: str, newest: int, *, largest: bool) -> None:
        """``best_checkpointed_iteration.txt``: the step of the best checkpoint that is there, and why in JSON."""
        root = self._checkpoints
        found = best(root, metric, 2, largest=largest, newest=newest, ignore=rolling_steps(root))
        if not found:
            return
        self._say_if_near(found, metric)
        value = metric_of(found[0], metric)
        step, mode = step_of(found[0]), "max" if largest else "min"
        write_json(root / BEST_REASON, {"step": step, "metric": metric, "mode": mode, "value": value})
        write_text(root / BEST, f"{step}\n")

    def _say_if_near(self, found: list[Path], metric: str) -> None:
        """The best checkpoint may be the best by chance: tell if it and the next differ by less than their errors."""
        measured = [(metric_of(folder, metric), metric_of(folder, f"{metric}_se")) for folder in found]
        known = [(value, error) for value, error in measured if value is not None and error is not None]
        if len(known) < 2 or found == self._near:
            return
        (first, first_error), (second, second_error) = known
        if abs(first - second) <= math.hypot(first_error, second_error):
            self._near = found
            log.info(
                "%s: the best checkpoint, %s (%s), and the next, %s (%s), differ by less than their standard errors",
                metric,
                found[0].name,
                with_error(first, first_error),
                found[1].name,
                with_error(second, second_error),
            )

    @contextmanager
    def _discarded_on_failure(self) -> Iterator[None]:
        """A checkpoint that could not be written leaves nothing behind."""
        try:
            with self._saving_errors():
                yield
        except BaseException:
            self._discard()
            raise

    @contextmanager
    def _saving_errors(self) -> Iterator[None]:
        """An error of the disk becomes one that a run may survive."""
        try:
            yield
        except Exception as error:
            found = disk_error(error, self._checkpoints)
            if found is None:
                raise
            words = explain(found, self._checkpoints, self._key)
            raise SaveError(f"the checkpoint could not be written: {words}", lasting=is_lasting(found)) from error

    @property
    def _key(self) -> str:
        """Of the folder of checkpoints."""
        return "actor_rollout.save" if self._config.actor_rollout.save else "hydra.run.dir"

    def _discard(self) -> None:
        if self._saving is not None:
            shutil.rmtree(self._saving.temporary, ignore_errors=True)
            self._saving = None

    def _driver(self, state: State) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(state).items() if name not in UNSAVED}
        return {
            "format": FORMAT,
            "curve": CURVE,
            **kept,
            "metrics": finite_or_null(state.metrics),
            "run_folder": str(self._run_dir.absolute()),
            **self._describe(state),
            "data": self._data,
            "config": self._config.dump(),
        }

    def _sync_logs(self) -> None:
        """A resumed run cuts these files to the checkpoint's step, so they must reach at least as far on disk."""
        for path in self._run_dir.glob("*.jsonl"):
            fsync(path)

    def _require_space(self) -> None:
        """Before the first step, and before each save: a full disk is found out while the last checkpoint is whole."""
        root = next(path for path in (self._checkpoints, *self._checkpoints.parents) if path.exists())
        earlier, actor = list_checkpoints(self._checkpoints), self._config.actor_rollout
        needed = int(1.1 * num_bytes(earlier[-1])) if earlier else _least_bytes(actor.load, actor)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise SaveError(
                f"{self._checkpoints}: a checkpoint takes about {needed:,} bytes, but {free:,} are free; make room, "
                f"lower training.keep_latest = {self._config.training.keep_latest} (0 keeps all), or name a folder on "
                f"another disk in {self._key}"
            )

    def save_hf(self, step: int) -> None:
        """``<checkpoints>/hf_0000020``: the policy after 20 steps as a folder that transformers loads.

        Raises:
            DiskError: the disk has taken nothing for half a minute.
        """
        self._export(self._checkpoints / f"hf_{step:07d}", self._key)

    def save_policy(self) -> Path:
        """``<run folder>/policy``: the policy and its tokenizer as a folder that transformers loads.

        Raises:
            DiskError: as above.
        """
        folder = self._run_dir / "policy"
        self._export(folder, "hydra.run.dir")
        return folder

    def _export(self, folder: Path, key: str) -> None:
        def export() -> None:
            with writing(folder, key):
                self._actor.save_hf(folder)

        patient(export, sleep=self._sleep)


def _least_bytes(load: str | None, lora: LoraConfig) -> int:
    """A lower bound of a checkpoint's size before there is one: fp32 weights, their master copy and two moments."""
    if load is None or lora.lora_r:  # the adapters are small, and the base is not in it
        return 0
    return 4 * sum(path.stat().st_size for path in Path(load).glob("*.safetensors"))


def save_config(config: RunConfig, run_dir: Path) -> None:
    """``config.yaml``: the merged recipe, every default filled in. An evaluation alone leaves a training run's."""
    if config.training.eval_only and (run_dir / "config.yaml").exists():
        return
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
