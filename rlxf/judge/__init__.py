"""Judges, which compare two answers to a prompt: a model, a language model behind an endpoint, a Python function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlxf.config.judge import JudgeConfig
from rlxf.config.kinds import JudgeName
from rlxf.judge.judge import Judge

if TYPE_CHECKING:
    from rlxf.judge.judged import Judging
    from rlxf.judge.model import ScoreTexts

__all__ = ["JUDGES", "Judge", "JudgeParts", "build_judging"]

# A judge's imports are inside its function: a process imports only what it holds.


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeParts:
    """The parts from which judges are built. A judge takes those that it needs."""

    config: JudgeConfig
    trust_remote_code: bool = False
    score: Callable[[], ScoreTexts] | None = None  # the run's reward role, for judge.load_as = reward_model
    judge: Judge | None = None  # one that is there already: a function in a process of its own


def _model(parts: JudgeParts) -> Judge:
    from rlxf.core.errors import ConfigError
    from rlxf.judge.model import ClassifierJudge, RewardModelJudge, folder_digest

    config, folder = parts.config, Path(str(parts.config.load))
    if config.load_as == "reward_model":
        if parts.score is None:
            raise ConfigError(
                f"judge.load_as = reward_model: nothing scores with {folder} here; use a classifier over two answers "
                "(judge.load_as=pair_classifier), a function or a service"
            )
        return RewardModelJudge(parts.score(), {"folder": folder_digest(folder)})
    return ClassifierJudge(
        folder,
        config.pair_template,
        first_label=config.first_label,
        batch_size=config.batch_size,
        trust_remote_code=parts.trust_remote_code,
    )


def _llm(parts: JudgeParts) -> Judge:
    from rlxf.core.errors import ConfigError
    from rlxf.core.http import HttpClient, HttpSettings
    from rlxf.judge.llm import LlmJudge, completions_url
    from rlxf.judge.template import load_template

    config = parts.config
    settings = HttpSettings(
        timeout_s=config.timeout_s,
        tries=config.tries,
        concurrency=config.concurrency,
        token_env=config.token_env,
        allow_link_local=config.allow_link_local,
    )
    template = load_template(Path(config.template) if config.template else None, config.answer)
    try:
        client = HttpClient(completions_url(str(config.base_url)), settings)
    except ConfigError as error:
        raise ConfigError(f"judge.base_url = {config.base_url}: {error}") from error
    return LlmJudge(config, template, client)


def _function(parts: JudgeParts) -> Judge:
    from rlxf.judge.process import load_judge

    return load_judge(Path(str(parts.config.function)))


JUDGES: dict[JudgeName, Callable[[JudgeParts], Judge]] = {
    "model": _model,
    "llm": _llm,
    "function": _function,
}


def build_judging(parts: JudgeParts, verdicts: Path | None) -> Judging:
    """The judge of a recipe, with its memory.

    Args:
        parts: ``judge`` of the recipe, whose ``kind`` is set.
        verdicts: the file with earlier verdicts, which gets the new ones; None: nothing is kept.

    Raises:
        ConfigError: the judge cannot be built, or the file cannot be read.
    """
    from rlxf.judge.both_orders import BothOrders, Prices
    from rlxf.judge.judged import Judging
    from rlxf.judge.llm import LlmJudge
    from rlxf.judge.verdicts import VerdictStore, judge_digest

    config = parts.config
    assert config.kind is not None  # who has no judge builds none
    judge = parts.judge or JUDGES[config.kind](parts)
    store = VerdictStore(verdicts, judge_digest(judge.identity)) if verdicts is not None else None
    prices = None
    if isinstance(judge, LlmJudge):
        prices = Prices(prompt=config.prompt_price, completion=config.completion_price)
        if store is not None:
            judge.go_on(store.spent)
    asking = BothOrders(judge, store, both=config.both_orders)
    return Judging(asking, tournament=config.tournament, prices=prices)
