"""Scoring with an HTTP service."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlxf.config.rewards import HttpForm
from rlxf.core.addresses import short_url
from rlxf.core.errors import ConfigError
from rlxf.core.http import HttpClient, HttpSettings, Reply
from rlxf.core.stop import Stop
from rlxf.score.texts import Answered, Asked

if TYPE_CHECKING:
    from rlxf.core.types import Text

GIVEN = ("prompts", "completions", "completion_ids", "ended")  # what a request of our form holds besides columns
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSourceSettings:
    """A service, and how it is asked."""

    url: str
    form: HttpForm = "rlxf"
    batch_size: int = 64  # completions of one request; the form `slime` has one
    concurrency: int = 4  # requests at the same time
    timeout_s: float = 60.0  # one try
    tries: int = 3
    deadline_s: float | None = None  # all completions of a step
    token_env: str | None = None  # environment variable with a bearer token
    label_column: str | None = None  # column of the data that the forms `openrlhf` and `slime` send as label
    allow_link_local: bool = False


class HttpSource:
    """Sends completions in batches to a service, and gives its scores.

    A batch whose request fails leaves its completions without a score; the other batches count.

    Args:
        settings: the service.
        key: of the recipe that describes it, for messages.
        eos_ids: what ends a completion; with them our form tells the service which completions have ended.
        stop: ends a wait early when the user asked for it.

    Raises:
        ConfigError: the address or the token cannot be used.
    """

    def __init__(
        self,
        settings: HttpSourceSettings,
        *,
        key: str = "reward",
        eos_ids: Collection[int] = (),
        stop: Stop | None = None,
    ) -> None:
        self._settings, self._key, self._eos_ids = settings, key, frozenset(eos_ids)
        http = HttpSettings(
            timeout_s=settings.timeout_s,
            tries=settings.tries,
            concurrency=settings.concurrency,
            token_env=settings.token_env,
            allow_link_local=settings.allow_link_local,
        )
        try:
            self._client = HttpClient(settings.url, http, stop=stop)
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from error

    def ask(self, asked: Asked) -> Answered:
        """The service's scores, None where it has none or did not answer.

        Raises:
            ConfigError: the data has no column ``label_column``, or a column whose name our form has taken.
        """
        count = len(asked.completions)
        size = 1 if self._settings.form == "slime" else self._settings.batch_size
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        body = self._body(asked)
        replies = self._client.post_all([body(batch) for batch in batches], deadline_s=self._settings.deadline_s)
        scores: list[float | None] = []
        problems, failed = [], 0
        for batch, reply in zip(batches, replies, strict=True):
            try:
                scores += self._scores(reply, len(batch))
            except ValueError as error:
                problems.append(str(error))
                scores += [None] * len(batch)
                failed += len(batch)
        return Answered(scores=scores, failed=failed, problem=_first(problems, len(batches)))

    def close(self) -> None:
        """End the client's thread."""
        self._client.close()

    def _body(self, asked: Asked) -> Callable[[range], dict[str, Any]]:
        """The request for some of the completions."""
        if self._settings.form == "rlxf":
            return self._our_body(asked)
        labels = self._labels(asked)
        prompts = [_text(prompt) for prompt in asked.prompts]

        def several(rows: range) -> dict[str, Any]:
            return {
                "query": [_query(asked.prompts[row], asked.completions[row]) for row in rows],
                "prompts": [prompts[row] for row in rows],
                "labels": ["" if labels is None else labels[row] for row in rows],
            }

        def one(rows: range) -> dict[str, Any]:
            (row,) = rows
            label = None if labels is None else labels[row]
            return {"prompt": prompts[row], "response": _text(asked.completions[row]), "label": label}

        return one if self._settings.form == "slime" else several

    def _our_body(self, asked: Asked) -> Callable[[range], dict[str, Any]]:
        for name in GIVEN:
            if name in asked.columns:
                where = short_url(self._settings.url)
                raise ConfigError(f"actor_rollout.data_path: rename column {name!r}; {where} gets its own {name}")
        columns: dict[str, list[Any]] = {
            "prompts": asked.prompts,
            "completions": asked.completions,
            "completion_ids": asked.completion_ids,
            **{name: [as_json(value) for value in values] for name, values in asked.columns.items()},
        }
        if self._eos_ids:
            columns["ended"] = [bool(ids) and ids[-1] in self._eos_ids for ids in asked.completion_ids]
        return lambda rows: {name: values[rows.start : rows.stop] for name, values in columns.items()}

    def _labels(self, asked: Asked) -> list[Any] | None:
        name = self._settings.label_column
        if name is None:
            return None
        if name not in asked.columns:
            known = ", ".join(sorted(asked.columns)) or "no further columns"
            raise ConfigError(f"{self._key}.label_column={name}: expected a column of the data, which has {known}")
        return [as_json(value) for value in asked.columns[name]]

    def _scores(self, reply: Reply, count: int) -> list[float | None]:
        """One finite number or None per completion.

        Raises:
            ValueError: there is no answer, or it is another one.
        """
        if reply.problem is not None:
            raise ValueError(reply.problem)
        where = short_url(self._settings.url)
        if self._settings.form == "slime":
            return [_score(reply.value, where, "the answer")]
        key = "scores" if self._settings.form == "rlxf" else "rewards"
        values = reply.value.get(key) if isinstance(reply.value, dict) else None
        if not isinstance(values, list):
            found = "an object without that list" if isinstance(reply.value, dict) else _kind(reply.value)
            raise ValueError(f'{where}: expected {{"{key}": [...]}} with a number per completion, got {found}')
        if len(values) != count:
            raise ValueError(f"{where}: expected {count} {key}, one per completion, got {len(values)}")
        return [_score(value, where, f"{key}[{index}]") for index, value in enumerate(values)]


def as_json(value: Any) -> Any:
    """A value of a data file as JSON has it: dates, bytes, decimals and others as text, NaN as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _text(text: Text) -> str:
    """A text, or the contents of chat messages with an empty line between them."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def _query(prompt: Text, completion: Text) -> str:
    """Prompt and completion as one text."""
    starts_turn = not isinstance(prompt, str) and prompt[-1]["role"] != "assistant"
    return _text(prompt) + ("\n\n" if starts_turn else "") + _text(completion)


def _score(value: Any, where: str, place: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"{where}: {place} must be a finite number or null, got {_kind(value)}")
    return float(value)


def _kind(value: Any) -> str:
    """What a value is, without the text of a server in it."""
    names = {str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"{value:.6g}" if isinstance(value, float) else "a number that is too large")


def _first(problems: list[str], requests: int) -> str | None:
    """The first problem, and how many requests had one."""
    if not problems:
        return None
    return problems[0] if requests == 1 else f"{problems[0]}; {len(problems)} of {requests} requests failed"
