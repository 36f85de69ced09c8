"""The judge of a run, in the process of the driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlxf.config.judge import JUDGE_MODEL
from rlxf.config.schema import RunConfig
from rlxf.core.stop import Stop
from rlxf.core.types import Text
from rlxf.judge import JUDGES, Judge, JudgeParts, build_judging
from rlxf.judge.judged import Judging
from rlxf.judge.model import ScoreTexts
from rlxf.judge.verdicts import NAME
from rlxf.score.scorer import ModelScorer


@contextmanager
def open_function_judge(config: RunConfig, stop: Stop) -> Iterator[Judge | None]:
    """The judge that is a Python function, in a process that ends with the context; None: another judge, or none.

    Raises:
        ConfigError: the function cannot be loaded.
    """
    if not config.judges or config.judge.function is None:
        yield None
    elif config.reward_workers == 0:
        yield JUDGES["function"](JudgeParts(config=config.judge))
    else:
        from rlxf.judge.process import ProcessJudge

        with stop.interruptible():
            judge = ProcessJudge(Path(config.judge.function), timeout_s=config.reward.timeout_s, stop=stop)
        try:
            yield judge
        finally:
            judge.close()


def build_judge(
    config: RunConfig,
    run_dir: Path | None,
    *,
    models: Mapping[str, ModelScorer] | None = None,
    function: Judge | None = None,
) -> Judging | None:
    """The judge that the recipe describes; None if it has none.

    Args:
        config: the recipe.
        run_dir: the run's folder; None: verdicts are kept only where ``judge.verdicts`` says.
        models: the run's reward models.
        function: what ``open_function_judge`` gave.

    Raises:
        ConfigError: the judge cannot be built.
    """
    if not config.judges:
        return None
    scorer = (models or {}).get(JUDGE_MODEL)
    score = None if scorer is None else partial(scoring_texts, scorer)
    trust = config.training.trust_remote_code
    parts = JudgeParts(config=config.judge, trust_remote_code=trust, score=score, judge=function)
    return build_judging(parts, verdicts_file(config, run_dir))


def scoring_texts(scorer: ModelScorer) -> ScoreTexts:
    """A reward model that is asked about texts: answers count as whole."""

    def score(prompts: Sequence[Text], answers: Sequence[str]) -> Tensor:
        return scorer.score_texts(prompts, answers, [True] * len(prompts)) if prompts else torch.zeros(0)

    return score


def verdicts_file(config: RunConfig, run_dir: Path | None) -> Path | None:
    """Where verdicts are kept: a run that goes on in another folder finds them beside its checkpoints."""
    folder = config.judge.verdicts or config.actor_rollout.save or run_dir
    return None if folder is None else Path(folder) / NAME
