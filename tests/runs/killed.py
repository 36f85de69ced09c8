"""Runs in processes of their own that die at a chosen moment, and whether a resumed run is the undisturbed one.

A server process imports torch and megatron once and forks each run, which saves five seconds a run.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.disks import FILLER, fill
from tests.runs.small import CLOCKED, Finished, Recipe

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs.warm"])


@dataclass(frozen=True)
class Call:
    """The moment before (or after) the n-th call of a function, ``module:attribute.path``."""

    target: str
    number: int = 1
    after: bool = False
    signal: signal.Signals = signal.SIGKILL

    def arm(self) -> None:
        def killed(call: Any, *args: Any, **options: Any) -> Any:
            if not self.after:
                os.kill(os.getpid(), self.signal)
            result = call(*args, **options)
            if self.after:
                os.kill(os.getpid(), self.signal)
            return result

        _replace(self.target, self.number, killed)


@dataclass(frozen=True)
class File:
    """The moment before the n-th time that a file or folder is opened to write, renamed to, or deleted."""

    event: str  # "open", "rename" or "rmtree"
    pattern: str  # of its path
    number: int = 1
    signal: signal.Signals = signal.SIGKILL

    def arm(self) -> None:
        count = [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            path = self._path(event, args)
            if path is not None and fnmatch.fnmatch(path, self.pattern):
                count[0] += 1
                if count[0] == self.number:
                    os.kill(os.getpid(), self.signal)

        sys.addaudithook(hook)

    def _path(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open" == self.event and isinstance(args[0], str | Path) and _writes(args[1]):
            return str(args[0])
        if event == "os.rename" and self.event == "rename":
            return str(args[1])
        return str(args[0]) if event == "shutil.rmtree" and self.event == "rmtree" else None


def _writes(mode: Any) -> bool:
    return isinstance(mode, str) and mode[:1] in "wax"


@dataclass(frozen=True)
class After:
    """Some time after the run has begun."""

    seconds: float
    signal: signal.Signals = signal.SIGKILL

    def arm(self) -> None:
        timer = threading.Timer(self.seconds, os.kill, (os.getpid(), self.signal))
        timer.daemon = True
        timer.start()


@dataclass(frozen=True)
class Raise:
    """An error instead of (or after) the n-th call of a function, ``module:attribute.path``."""

    target: str
    error: str  # its class, ``module:name``
    text: str = "injected"
    number: int = 1
    after: bool = False
    errno: int = 0  # of an error of the disk

    def arm(self) -> None:
        module, _, name = self.error.partition(":")
        error = getattr(importlib.import_module(module), name)(*((self.errno,) if self.errno else ()), self.text)

        def failing(call: Any, *args: Any, **options: Any) -> Any:
            if self.after:
                call(*args, **options)
            raise error

        _replace(self.target, self.number, failing)


@dataclass(frozen=True)
class Poison:
    """The reference's log-probability of one chosen side becomes NaN, at the n-th time that it is asked."""

    row: int
    number: int = 1

    def arm(self) -> None:
        def poisoned(call: Any, *args: Any, **options: Any) -> Any:
            logps = call(*args, **options)
            logps.chosen[self.row] = float("nan")
            return logps

        _replace("rlxf.reference.frozen:FrozenReference.logps", self.number, poisoned)


def _replace(target: str, number: int, instead: Any) -> None:
    """``instead(function, *args)`` is called in place of the n-th call."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, count = getattr(owner, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return instead(function, *args, **options) if count[0] == number else function(*args, **options)

    setattr(owner, name, counted)


@dataclass(frozen=True)
class Beside:
    """Steps are sampled beside the update: in threads, and with a copy of what was pushed, as on Ray.

    In one process the engine has otherwise always sampled before the update begins.
    """

    cut: int = 0  # the call of ``HfEngine.generate``, from 1, that fails; 0: none does
    update: int = 0  # the update, from 1, that has begun by then
    by_signal: bool = False  # SIGTERM ends the run; else the engine is lost

    def arm(self) -> None:
        from rlxf.assembly import local
        from rlxf.core.errors import StopRequested, WorkerLost
        from rlxf.schedule import InThreads
        from rlxf.sync.push import LocalSink

        kept: dict[int, dict[str, Any]] = {}
        send, stop_of, run_prepared = LocalSink._send, local.Stop, local.run_prepared
        begun = threading.Event()

        def keeping(sink: LocalSink, index: int, bucket: Any, tensors: Any) -> None:
            kept[index] = {name: tensor.clone() for name, tensor in tensors}
            send(sink, index, bucket, iter(kept[index].items()))

        def pushed(sink: LocalSink, index: int, bucket: Any) -> Any:
            payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
            bucket.fill(payload, kept[index].items())
            return payload

        def ends(call: Any, *args: Any, **options: Any) -> Any:
            assert begun.wait(60)
            if not self.by_signal:
                raise WorkerLost("lost infer rank 0")
            os.kill(os.getpid(), signal.SIGTERM)
            error = StopRequested("stopped while waiting for generate of infer rank 0")
            error.exit_code = 128 + signal.SIGTERM
            raise error

        def begins(call: Any, *args: Any, **options: Any) -> Any:
            begun.set()
            return call(*args, **options)

        LocalSink._send, LocalSink.pushed = keeping, pushed  # type: ignore[method-assign]
        local.Stop = lambda **options: stop_of(grace_s=options["grace_s"])  # type: ignore[assignment,misc]
        local.run_prepared = lambda found, roles, **options: run_prepared(
            found, roles, **{**options, "lanes": InThreads(options["stop"])}
        )
        _replace("rlxf.rollout.hf:HfEngine.generate", self.cut, ends)
        _replace("rlxf.update.actor:MegatronActor.update", self.update, begins)


@dataclass(frozen=True)
class FullDisk:
    """The disk of ``folder`` is full for some seconds, from before the n-th call of a function on.

    ``killed``: or until the process is killed, before that call.
    """

    folder: Path
    target: str
    number: int = 1
    seconds: float = 2.5
    killed: int = 0

    def arm(self) -> None:
        def filled(call: Any, *args: Any, **options: Any) -> Any:
            fill(self.folder)
            if not self.killed:
                threading.Timer(self.seconds, (self.folder / FILLER).unlink).start()
            return call(*args, **options)

        _replace(self.target, self.number, filled)
        if self.killed:
            Call(self.target, self.killed).arm()


Moment = Call | File | After | Raise | Poison | Beside | FullDisk


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int  # exit code; minus the signal that killed it
    output: str


def run_in_child(recipe: Recipe, run_dir: Path, moment: Moment | None = None, log: Path | None = None) -> Ended:
    """Run the recipe in a process that dies at ``moment``; again in the same folder it is resumed.

    ``log``: where its output goes; else beside the run folder.
    """
    log = log or run_dir.with_name(f"{run_dir.name}.log")
    return _ended(_child, (recipe, run_dir, moment, log), log, timeout_s=120)


def _ended(run: Callable[..., None], arguments: tuple[Any, ...], log: Path, timeout_s: float) -> Ended:
    """How the process of ``run`` ended, whose output is in ``log``."""
    process = _CONTEXT.Process(target=run, args=arguments)
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the run did not end in {timeout_s:g} s:\n{log.read_text()[-4000:]}")
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text())


def typed_in_child(arguments: Sequence[str], timeout_s: float) -> Ended:
    """``python ray_gpt.py`` with these arguments, in a process that has imported everything already."""
    with tempfile.NamedTemporaryFile() as log:
        return _ended(_typed, (arguments, Path(log.name)), Path(log.name), timeout_s)


def _typed(arguments: Sequence[str], log: Path) -> None:
    from workers.train import main

    _redirect(log)
    sys.exit(main(("python", "ray_gpt.py"), arguments))


def _redirect(log: Path) -> None:
    """All that this process prints goes to ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def undisturbed_run(recipe: Recipe, run_dir: Path) -> Finished:
    """The same run without a fault, in a child as well."""
    ended = run_in_child(recipe, run_dir)
    assert ended.code == 0, ended.output
    return Finished(run_dir)


def _child(recipe: Recipe, run_dir: Path, moment: Moment | None, log: Path) -> None:
    import logging

    from rlxf.assembly.local import launch
    from rlxf.config.load import load_config
    from rlxf.core.command import Typed
    from rlxf.core.errors import RlxfError, notes_of

    _redirect(log)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("rlxf").setLevel(logging.INFO)
    code = 0
    try:
        config = load_config({"runtime": "local", **recipe})
        if moment is not None:
            moment.arm()
        launch(config, run_dir, Typed("small", ("--config-name", "small")))
    except RlxfError as error:
        sys.stderr.write("".join(f"{line}\n" for line in (error, *notes_of(error))))
        code = error.exit_code
    except BaseException:  # noqa: BLE001  the parent reads it from the log
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def assert_same_run(run_dir: Path, undisturbed: Finished) -> None:
    """Every number, pair, prompt and weight is that of the undisturbed run, bit for bit."""
    resumed = Finished(run_dir)
    assert resumed.numbers == undisturbed.numbers
    for name in ("rollouts.jsonl", "samples.jsonl", "eval.jsonl"):
        mine, theirs = run_dir / name, undisturbed.folder / name
        assert mine.exists() == theirs.exists(), name  # a replay evaluates nothing
        assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), name
    assert resumed.weights.keys() == undisturbed.weights.keys()
    assert all(resumed.weights[name].equal(value) for name, value in undisturbed.weights.items())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run_dir, undisturbed.folder)]
    for key in ("steps", "start", "end"):
        assert _unclocked(summaries[0][key]) == _unclocked(summaries[1][key]), key


def _unclocked(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not name.startswith(CLOCKED)}
