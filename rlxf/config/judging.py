"""Checks of the keys of the judge, and of what evaluations compare with."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rlxf.config.config_json import read_settings
from rlxf.config.judge import OWN_KEYS, JudgeConfig
from rlxf.config.problems import Problem, wrong
from rlxf.config.schema import RunConfig
from rlxf.core.addresses import url_problem
from rlxf.core.errors import ConfigError

logger = logging.getLogger(__name__)

_SOURCES = ("load", "function", "base_url")
_SOURCE_OF = {"model": "load", "function": "function", "llm": "base_url"}
_RESERVED = {"model": "judge.model", "messages": "judge.template", "temperature": "", "max_tokens": "",
             "stream": None, "n": None}  # fmt: skip
_PLACEHOLDERS = ("{prompt}", "{first}", "{second}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"(sk|hf|gsk|pk)[-_][A-Za-z0-9-_]{8,}")


def judge_problems(config: RunConfig) -> Iterator[Problem]:
    """One judge at most, with keys that it reads; and an evaluation's reference answers, which need a judge."""
    if config.offline:
        return
    judge = config.judge
    given = [key for key in _SOURCES if getattr(judge, key) is not None]
    if len(given) > 1:
        keys = tuple(f"judge.{key}" for key in given)
        yield Problem(keys, f"{' and '.join(keys)} are set: expected one of them, which judges; remove the rest")
        return
    yield from _unread(judge)
    if judge.base_url is not None:
        yield from _server(config)
    if judge.load is not None:
        yield from _model(config)
    yield from _reference_answers(config)


def warn_of_judge(config: RunConfig) -> None:
    """A warning if a judge is given and nothing is judged."""
    if config.offline and config.judge.kind is not None:
        logger.warning("judge has no effect: training.stage = %s reads a file", config.training.stage)


def _unread(judge: JudgeConfig) -> Iterator[Problem]:
    """Keys that are set, and that the judge does not read."""
    own = () if judge.kind is None else OWN_KEYS[_SOURCE_OF[judge.kind]]
    fields = JudgeConfig.model_fields
    for source, keys in OWN_KEYS.items():
        for key in keys:
            value = getattr(judge, key)
            if key in own or value == fields[key].get_default(call_default_factory=True):
                continue
            needs = "judge.base_url, the server's address" if source == "base_url" else f"judge.{source}"
            yield wrong(f"judge.{key}", value, f"nothing reads it without {needs}; set that, or remove this key")


def _server(config: RunConfig) -> Iterator[Problem]:
    judge = config.judge
    url = str(judge.base_url)
    problem = url_problem(url, allow_link_local=judge.allow_link_local)
    if problem is not None:  # it does not show the address if that may hold a secret
        yield Problem(("judge.base_url",), f"judge.base_url: {problem}")
    elif "?" in url or "#" in url:
        text = "expected an address without ? and #; further keys of a request belong into judge.options"
        yield Problem(("judge.base_url",), f"judge.base_url: {text}")
    if judge.model is None:
        yield Problem(("judge.model",), "judge.model is required with judge.base_url: the name of the server's model")
    yield from _token(config)
    if judge.template is not None:
        yield from _template_file(Path(judge.template))
    for key, better in _RESERVED.items():
        if key in judge.options and not (better == "" and judge.options[key] is None):
            use = f"; use {better or f'judge.{key}'}" if better is not None else ""
            yield wrong("judge.options", judge.options, f"{key!r} cannot be set here{use}")
    if judge.max_cost is not None and not (judge.prompt_price or judge.completion_price):
        expected = "expected prices, too: set judge.prompt_price and judge.completion_price, or use judge.max_calls"
        yield wrong("judge.max_cost", judge.max_cost, expected, "judge.prompt_price", "judge.completion_price")


def _token(config: RunConfig) -> Iterator[Problem]:
    name = config.judge.token_env
    if name is None:
        return
    if not _VARIABLE.fullmatch(name) or _TOKEN.fullmatch(name):  # it may be the token itself: it is not shown
        text = "judge.token_env: expected the name of an environment variable, such as OPENAI_API_KEY, not the token"
        yield Problem(("judge.token_env",), text)
    elif not os.environ.get(name) and not config.dry_run:
        yield wrong("judge.token_env", name, f"this environment variable is not set; export {name} before the run")


def _template_file(path: Path) -> Iterator[Problem]:
    if not path.is_file():
        return  # reported with the other files
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield wrong("judge.template", str(path), f"cannot be read as UTF-8 text: {error}")
        return
    yield from _placeholders("judge.template", str(path), text)


def _placeholders(key: str, value: str, text: str) -> Iterator[Problem]:
    if missing := [name for name in _PLACEHOLDERS if name not in text]:
        yield wrong(key, value, f"expected {', '.join(_PLACEHOLDERS)} in the text; {', '.join(missing)} is not there")


def _model(config: RunConfig) -> Iterator[Problem]:
    judge = config.judge
    yield from _placeholders("judge.pair_template", judge.pair_template, judge.pair_template)
    folder = Path(str(judge.load))
    if not folder.is_dir():
        return  # reported with the other folders
    try:
        settings = read_settings(folder)
    except ConfigError as error:
        yield Problem(("judge.load",), f"judge.load = {folder}: {error}")
        return
    kinds = settings.get("architectures") or []
    labels = settings.get("num_labels") or len(settings.get("id2label") or range(2))
    if kinds and not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        text = f"is a {kinds[0]}, which has no score head; expected a *ForSequenceClassification"
        yield Problem(("judge.load",), f"judge.load = {folder}: {text}")
    elif judge.load_as == "reward_model" and labels != 1:
        text = f"has {labels} labels; a reward model has one; or set judge.load_as=pair_classifier"
        yield Problem(("judge.load", "judge.load_as"), f"judge.load = {folder}: {text}")
    elif labels not in (1, 2):
        text = f"has {labels} labels; a classifier over two answers has one or two"
        yield Problem(("judge.load",), f"judge.load = {folder}: {text}")


def _reference_answers(config: RunConfig) -> Iterator[Problem]:
    both = ("eval.reference_answers", "eval.reference_column")
    values = config.eval.reference_answers, config.eval.reference_column
    if None not in values:
        yield Problem(both, f"{' and '.join(both)} are both set: answers come from one of them; remove the other")
        return
    for key, value in zip(both, values, strict=True):
        if value is not None and config.judge.kind is None:
            expected = "expected a judge that compares with it; set judge.load, judge.function or judge.base_url"
            yield wrong(key, value, expected, "judge.load", "judge.function", "judge.base_url")
