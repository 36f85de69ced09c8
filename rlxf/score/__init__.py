"""Giving a completion a score: reward models, functions, rules, services, recorded scores; sums and penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlxf.config.kinds import ReaderName, ScorerName
from rlxf.score.scorer import ReaderParts, Scorer, ScorerParts
from rlxf.score.texts import TextSource

if TYPE_CHECKING:
    from rlxf.score.functions import FunctionSource

__all__ = ["READERS", "SCORERS", "ReaderParts", "Scorer", "ScorerParts", "TextSource"]

# A scorer's imports are inside its function: a process imports only what it holds.


def _model(parts: ScorerParts) -> Scorer:
    from rlxf.score.reward_model import RewardModelScorer

    return RewardModelScorer(parts.load_model(), parts.config, parts.limits, parts.load_tokenizer(), parts.policy())


def _recorded(parts: ScorerParts) -> Scorer:
    from rlxf.score.recorded import RecordedScorer

    return RecordedScorer(str(parts.recording))


SCORERS: dict[ScorerName, Callable[[ScorerParts], Scorer]] = {
    "model": _model,
    "recorded": _recorded,
}
"""Who scores the tokens of completions."""


def _function(parts: ReaderParts) -> TextSource:
    from functools import partial
    from pathlib import Path

    from rlxf.score.functions import FunctionSource

    path = Path(str(parts.source.function))
    return _in_process(partial(FunctionSource.from_file, path, parts.key), f"{parts.key}={path}", parts)


def _http(parts: ReaderParts) -> TextSource:
    from rlxf.score.http import HttpSource, HttpSourceSettings

    source = parts.source
    settings = HttpSourceSettings(
        url=str(source.url),
        form=source.form,
        batch_size=source.batch_size,
        concurrency=source.concurrency,
        timeout_s=source.timeout_s,
        tries=source.tries,
        deadline_s=parts.timeout_s,
        token_env=source.token_env,
        label_column=source.label_column,
        allow_link_local=source.allow_link_local,
    )
    eos_ids = parts.policy().eos_ids if source.form == "rlxf" else ()
    return HttpSource(settings, key=parts.key.removesuffix(".url"), eos_ids=eos_ids, stop=parts.stop)


def _in_process(make: Callable[[], FunctionSource], name: str, parts: ReaderParts) -> TextSource:
    """In ``parts.workers`` processes; with 0 of them in this one."""
    from rlxf.score.processes import ProcessSource

    if not parts.workers:
        return make()
    return ProcessSource(make, name, workers=parts.workers, timeout_s=parts.timeout_s, stop=parts.stop)


def _rule(parts: ReaderParts) -> TextSource:
    from functools import partial

    from rlxf.score.rules import rule_source

    source = parts.source
    name = f"{parts.key}={source.rule}"
    return _in_process(partial(rule_source, str(source.rule), source.options, name), name, parts)


READERS: dict[ReaderName, Callable[[ReaderParts], TextSource]] = {"function": _function, "http": _http, "rule": _rule}
"""Who scores the texts of completions, by the kind of an entry of ``reward.sources``."""
