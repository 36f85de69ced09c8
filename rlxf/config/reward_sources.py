"""Checks of ``reward.sources``: what each entry must be, and what belongs together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from rlxf.config.problems import Problem, wrong
from rlxf.config.rewards import TAKEN_NAMES, RewardSource
from rlxf.config.rules import RULE_OPTIONS, as_rule, rule_problems
from rlxf.config.schema import RunConfig
from rlxf.core.addresses import url_problem

_WHOLE = "reward.sources"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OF_MODELS = ("tokenizer_name_or_path", "read_at")
_OF_SERVICES = (
    *("form", "label_column", "batch_size", "concurrency", "timeout_s", "tries", "token_env", "allow_link_local"),
)


def source_problems(config: RunConfig) -> Iterator[Problem]:
    """All mistakes in the sources that no single value shows."""
    reward = config.reward
    if not reward.sources:
        return
    if reward.function is not None:
        text = "reward.function and reward.sources are both set: list the function as a source, {function: ...}"
        yield Problem(("reward.function", _WHOLE), text)
    if reward.load is not None and reward.load not in [source.load for source in reward.sources]:
        text = "reward.load and reward.sources are both set: list the model as a source, {load: ...}"
        yield Problem(("reward.load", _WHOLE), text)
    for number, source in enumerate(reward.sources):
        yield from _source(f"{_WHOLE}[{number}]", source, files=not config.dry_run)
    if any(len(source.given) != 1 for source in reward.sources):
        return
    for name, count in Counter(source.name for source in reward.sources if source.name).items():
        if count > 1:
            yield Problem((_WHOLE,), f"{_WHOLE}: {count} sources are named {name!r}; give each a name of its own")
    if not any(source.weight for source in reward.sources):
        yield Problem((_WHOLE,), f"{_WHOLE}: every weight is 0, so all completions tie; give one another weight")


def _source(key: str, source: RewardSource, *, files: bool) -> Iterator[Problem]:
    given, keys = source.given, (_WHOLE,)
    if len(given) != 1:
        found = f"{' and '.join(given)} are set" if given else "none of them is set"
        yield Problem(keys, f"{key}: expected exactly one of load, function, url and rule; {found}")
        return
    if source.name is not None and not _NAME.fullmatch(source.name):
        expected = "expected letters, digits, dots, dashes and underscores, at most 64: it becomes part of metrics"
        yield wrong(f"{key}.name", source.name, expected, _WHOLE)
    elif source.name in TAKEN_NAMES:
        expected = f"rewards/{source.name} is the implicit reward of DPO already; choose another name"
        yield wrong(f"{key}.name", source.name, expected, _WHOLE)
    kind = source.kind
    for names, owner, what in (
        (_OF_MODELS, "model", "a reward model (load)"),
        (_OF_SERVICES, "http", "a service (url)"),
    ):
        for name in names if kind != owner else ():
            if name in source.model_fields_set:
                default = RewardSource.model_fields[name].default
                if getattr(source, name) != default:
                    expected = f"only {what} reads it, and this source is a {kind}; leave it out"
                    yield wrong(f"{key}.{name}", getattr(source, name), expected, _WHOLE)
    if source.options and kind != "rule":
        yield wrong(f"{key}.options", source.options, f"only a rule reads them, and this source is a {kind}", _WHOLE)
    if source.rule is not None:
        place = f"{key}.options" if as_rule(source.rule) in RULE_OPTIONS else f"{key}.rule"
        for problem in rule_problems(place, source.rule, source.options, files=files):
            yield Problem((_WHOLE,), problem.text)
    if source.url is not None:
        yield from _service(key, source, source.url)


def _service(key: str, source: RewardSource, url: str) -> Iterator[Problem]:
    problem = url_problem(url, allow_link_local=source.allow_link_local)
    if problem is not None:  # it does not show the address if that may hold a secret
        yield Problem((_WHOLE,), f"{key}.url: {problem}")
    if source.form == "rlxf" and source.label_column is not None:
        expected = "only the forms openrlhf and slime send a label; the form rlxf sends all columns"
        yield wrong(f"{key}.label_column", source.label_column, expected, _WHOLE)
