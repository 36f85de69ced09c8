"""The judge of a run, in the process of the driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlxf.assembly.roles import policy_folder, policy_tokenizer
from rlxf.config.judge import JUDGE_MODEL
from rlxf.config.schema import RunConfig
from rlxf.core.stop import Stop
from rlxf.core.types import Text
from rlxf.judge import JUDGES, Judge, JudgeParts, build_judging
from rlxf.judge.judged import Judging
from rlxf.judge.model import ScoreTexts
from rlxf.judge.verdicts import NAME
from rlxf.models.tokenizer import eos_token_ids
from rlxf.score.encoded import as_rollouts
from rlxf.score.scorer import Scorer


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
    models: Mapping[str, Scorer] | None = None,
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
    score = None if scorer is None else partial(scoring_texts, config, scorer)
    trust = config.training.trust_remote_code
    parts = JudgeParts(config=config.judge, trust_remote_code=trust, score=score, judge=function)
    return build_judging(parts, verdicts_file(config, run_dir))


def scoring_texts(config: RunConfig, scorer: Scorer) -> ScoreTexts:
    """A reward model that is asked about texts: answers count as ended."""
    tokenizer = policy_tokenizer(config)
    eos_id = eos_token_ids(policy_folder(config), tokenizer, config.actor_rollout.eos_tokens)[0]

    def score(prompts: Sequence[Text], answers: Sequence[str]) -> Tensor:
        if not prompts:
            return torch.zeros(0)
        return scorer.score(as_rollouts(prompts, answers, tokenizer, eos_id=eos_id))

    return score


def verdicts_file(config: RunConfig, run_dir: Path | None) -> Path | None:
    """Where verdicts are kept: a run that goes on in another folder finds them beside its checkpoints."""
    folder = config.judge.verdicts or config.actor_rollout.save or run_dir
    return None if folder is None else Path(folder) / NAME
