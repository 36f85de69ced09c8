"""The sources of a run's scores, put together: models from the roles, functions, rules and services from the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from rlxf.assembly.data import needs_scorer
from rlxf.assembly.roles import build_models, build_scorer, policy_tokenizer, sampled_by
from rlxf.config.rewards import RewardSource
from rlxf.config.schema import RunConfig
from rlxf.core.stop import Stop
from rlxf.platform import Platform, Process
from rlxf.score import READERS, ReaderParts, Scorer, TextSource
from rlxf.score.combine import Term
from rlxf.score.sources import Rewards, Tally, TextTerm, TokenTerm, Unscaled


@contextmanager
def open_readers(config: RunConfig, stop: Stop) -> Iterator[dict[str, TextSource]]:
    """The sources that read texts, by name; their processes end with the context.

    Raises:
        ConfigError: a function cannot be loaded.
    """
    found: dict[str, TextSource] = {}
    with ExitStack() as stack:
        for number, source in enumerate(config.reward.listed if needs_scorer(config) else ()):
            if source.kind == "model":
                continue
            key = f"reward.sources[{number}].{source.given[0]}" if config.reward.sources else "reward.function"
            parts = ReaderParts(
                source=source,
                key=key,
                workers=config.reward_workers,
                timeout_s=config.reward.timeout_s,
                stop=stop,
                policy=partial(sampled_by, config),
            )
            with stop.interruptible():
                reader = READERS[source.kind](parts)
            stack.callback(reader.close)
            found[str(source.name)] = reader
        yield found


def make_rewards(
    config: RunConfig,
    models: Mapping[str, Scorer],
    readers: Mapping[str, TextSource],
    *,
    platform: Platform,
    tally: Tally,
    place: Callable[[], str],
    stop: Stop,
) -> Rewards:
    """Everything that scores in a run; a replay's scores need no process of their own."""
    if config.replays_scores:
        recorded = TokenTerm(term=Term(name="recorded"), scorer=build_scorer(config, platform, Process()))
        sources: Sequence[TokenTerm | TextTerm] = [recorded]
    else:
        sources = [_source(config, source, models, readers) for source in config.reward.listed]
    tokenizer = policy_tokenizer(config)
    return Rewards(sources, tokenizer, tally, config.reward.max_failures, place, stop)


def _source(
    config: RunConfig, source: RewardSource, models: Mapping[str, Scorer], readers: Mapping[str, TextSource]
) -> TokenTerm | TextTerm:
    name = str(source.name)
    leave_out = source.missing == "leave_out"
    term = Term(name=name, weight=source.weight, scale=source.scale, leave_out=leave_out, whole_step=source.whole_step)
    if name in models:
        return TokenTerm(term=term, scorer=models[name])
    here = source.kind in ("function", "rule") and config.reward_workers == 0
    return TextTerm(term=term, reader=readers[name], here=here)


@dataclass(slots=True)
class _Count:
    """Failed scores of a script, of which none is allowed."""

    all_failed_scores: int = 0


@contextmanager
def open_scorer(config: RunConfig, platform: Platform, stop: Stop | None = None) -> Iterator[Scorer]:
    """What scores by the recipe, in this process and its children, for a script.

    Raises:
        ModelError: a folder does not hold a reward model. ConfigError: a function cannot be loaded.
    """
    stop = stop or Stop()
    models = build_models(config, platform, Process()) if config.reward.listed else {}
    with open_readers(config, stop) as readers:
        yield Unscaled(
            make_rewards(config, models, readers, platform=platform, tally=_Count(), place=lambda: "scoring", stop=stop)
        )
