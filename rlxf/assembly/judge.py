"""The judge of a run, in the process of the driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlxf.config.schema import RunConfig
from rlxf.judge import JudgeParts, build_judging
from rlxf.judge.judged import Judging
from rlxf.judge.model import ScoreTexts
from rlxf.judge.verdicts import NAME


def build_judge(
    config: RunConfig,
    run_dir: Path | None,
    *,
    score: Callable[[], ScoreTexts] | None = None,
    function: Callable[..., Any] | None = None,
) -> Judging | None:
    """The judge that the recipe describes; None if it has none.

    Args:
        config: the recipe.
        run_dir: the run's folder; None: verdicts are kept only where ``judge.verdicts`` says.
        score: gives what scores texts by the reward model of ``judge.load``.
        function: the function of ``judge.function``; None: it is loaded into this process.

    Raises:
        ConfigError: the judge cannot be built.
    """
    if not config.judges:
        return None
    parts = JudgeParts(
        config=config.judge, trust_remote_code=config.training.trust_remote_code, score=score, function=function
    )
    return build_judging(parts, verdicts_file(config, run_dir))


def verdicts_file(config: RunConfig, run_dir: Path | None) -> Path | None:
    """Where verdicts are kept: a run that goes on in another folder finds them beside its checkpoints."""
    folder = config.judge.verdicts or config.actor_rollout.save or run_dir
    return None if folder is None else Path(folder) / NAME
