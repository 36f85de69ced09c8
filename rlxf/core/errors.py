"""The errors that a user can meet. A message names what was expected, what came, the key, and what to do next."""

from __future__ import annotations


class RlxfError(Exception):
    """Base of every error of this package; the entry point prints it as one line, without a traceback."""

    exit_code = 1
    complete_steps: int | None = None  # driver steps that were complete when it ended the loop


def notes_of(error: BaseException) -> list[str]:
    """The lines that were added to an error with ``add_note``; they are printed after its message."""
    return list(getattr(error, "__notes__", []))


class ConfigError(RlxfError):
    """The recipe, a data file or a model folder is wrong. Holds every mistake found, not only the first."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(ConfigError):
    """A data file is wrong; each problem names file, line and reason."""


class ModelError(ConfigError):
    """A model folder cannot be used for its role."""


class PlacementError(RlxfError):
    """The cluster cannot hold the pools that the recipe asks for."""

    exit_code = 3


class OutOfMemoryPlan(RlxfError):
    """By estimate a role needs more memory than its devices have; only a dry run raises it."""


class ShapeError(RlxfError):
    """Data between two rooms has the wrong shape: always a defect of the program, never of the recipe."""


class WorkerLost(RlxfError):
    """A worker process died, or was ended because it did not move; names worker, node, stage and step."""

    stage: str | None = None  # in which it was noticed, as ``timing/*`` names it


class UnhealthyRun(RlxfError):
    """The run's curves say what `health.stop_on` ends a run for. Its last step is complete."""


class RunInterrupted(RlxfError):
    """The run cannot go on here and now, but later it can: devices are missing, or it was rebuilt too often.

    Its exit code is the one of ``EX_TEMPFAIL``, after which ``scripts/supervise.sh`` starts the run again.
    """

    exit_code = 75


class StageTimeout(RlxfError):
    """A remote stage did not answer before its deadline; names what was waited for."""


class SyncError(RlxfError):
    """A rollout engine does not hold the actor's weights."""


class TrainingError(RlxfError):
    """Training cannot continue: a non-finite loss, or too many steps without a single pair."""


class ScoreError(RlxfError):
    """Completions could not be scored: the user's reward function failed, or returned something else than scores."""


class StopRequested(RlxfError):
    """The user asked the run to end (SIGINT or SIGTERM); raised at a point where nothing is half done."""

    exit_code = 143


class CheckpointError(RlxfError):
    """No checkpoint can be taken over, or the one that was found belongs to another run."""

    exit_code = 4


class DiskError(RlxfError):
    """A file of the run could not be written: a full disk, a quota, a folder that is read-only."""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting  # waiting does not help


class SaveError(DiskError, CheckpointError):
    """A checkpoint could not be written; those before are unchanged, and a later one may be written."""

    exit_code = CheckpointError.exit_code
