"""A judge that is a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlxf.config.judge import JudgeConfig
from rlxf.core.http import Reply
from rlxf.core.types import Text
from rlxf.judge.both_orders import Prices
from rlxf.judge.judge import Columns, Heard, Usage, Verdict, ignore, plain_text
from rlxf.judge.replies import probability
from rlxf.judge.template import fill
from rlxf.judge.verdicts import Spent

log = logging.getLogger(__name__)

_SHOWN = 80  # characters of a reply in a message


class Client(Protocol):
    """Sends requests: ``HttpClient`` of rlxf/core/http.py."""

    def post_all(
        self, bodies: Sequence[Any], *, deadline_s: float | None = None, done: Callable[[int, Reply], None] = ...
    ) -> list[Reply]: ...

    def close(self) -> None: ...


def completions_url(base_url: str) -> str:
    """Where chat completions are asked for: ``http://host:8000`` and ``http://host:8000/v1`` mean the same."""
    base = base_url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return base + ("/chat/completions" if urlsplit(base).path.strip("/") else "/v1/chat/completions")


class LlmJudge:
    """Asks a chat model, one request per question, and reads the verdict in its reply.

    A failed call, an unreadable response and a question over the budget give no verdict; they are asked again when
    they come up again. A reply without a verdict is one: it was paid for.

    Args:
        config: what is asked, and how much it may cost.
        template: text with {prompt}, {first} and {second}.
        client: sends the requests.
    """

    is_symmetric = False
    reads_columns = False

    def __init__(self, config: JudgeConfig, template: str, client: Client) -> None:
        self._config = config
        self._template = template
        self._client = client
        self._spent = Spent()  # what counts towards the budget
        self._lock = threading.Lock()
        self._told = False  # that the budget is used up
        self._prices = Prices(prompt=config.prompt_price, completion=config.completion_price)

    @property
    def identity(self) -> Mapping[str, Any]:
        config = self._config
        return {
            "kind": "llm",
            "url": completions_url(str(config.base_url)),
            "model": config.model,
            "template": self._template,
            "answer": config.answer,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "options": config.options,
        }

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where there is no verdict."""
        bodies = [self._body(*question) for question in zip(prompts, first, second, strict=True)]
        asking = _Asking(len(bodies), self._verdict, heard)
        start = 0
        while start < len(bodies) and (size := self._affordable(len(bodies) - start)):
            asking.send(self._client, bodies, start, start + size)
            start += size
        asking.leave_out(start, len(bodies))
        asking.report(f"judge.base_url = {self._config.base_url}", start)
        return torch.tensor(asking.found, dtype=torch.float32)

    def go_on(self, spent: Spent) -> None:
        """Count calls and tokens of before towards the budget."""
        self._spent = replace(spent)

    def close(self) -> None:
        self._client.close()

    def _body(self, prompt: Text, first: str, second: str) -> dict[str, Any]:
        content = fill(self._template, prompt=plain_text(prompt), first=first, second=second)
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            **self._config.options,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _affordable(self, count: int) -> int:
        """How many of ``count`` questions may be sent at once; warns the first time that it is none."""
        config, limits = self._config, [count]
        with self._lock:
            if config.max_calls is not None:
                limits.append(config.max_calls - self._spent.calls)
            if config.max_cost is not None:  # a reply's cost is known when it is there: ask a few at a time
                limits.append(config.concurrency if self._prices.cost(self._spent) < config.max_cost else 0)
            size = max(0, min(limits))
            if not size and not self._told:
                self._told = True
                key = (
                    "max_calls"
                    if config.max_calls is not None and self._spent.calls >= config.max_calls
                    else "max_cost"
                )
                log.warning(
                    "judge.%s = %g is used up (%d calls, cost %.4g): the judge is asked no more, and pairs without a "
                    "verdict are missing; raise it to go on",
                    key, getattr(config, key), self._spent.calls, self._prices.cost(self._spent),
                )  # fmt: skip
        return size

    def _verdict(self, reply: Reply) -> tuple[Verdict, str | None]:
        """The verdict of a reply, and why there is none."""
        if reply.problem is not None:
            return Verdict(final=False), reply.problem
        text = _text(reply.value)
        if text is None:
            return Verdict(final=False), "the response has no choices[0].message.content; expected a chat completion"
        usage = _usage(reply.value)
        with self._lock:
            self._spent.add(usage)
        found = probability(text, self._config.answer)
        problem = None
        if math.isnan(found):
            problem = f"the reply holds no verdict of judge.answer = {self._config.answer}: {text[:_SHOWN]!r}"
        return Verdict(probability=found, usage=usage, reply=text), problem


class _Asking:
    """The questions of one call, as their replies come."""

    def __init__(self, count: int, read: Callable[[Reply], tuple[Verdict, str | None]], heard: Heard) -> None:
        self.found = [math.nan] * count
        self._read = read
        self._heard = heard
        self._problems: dict[int, str] = {}

    def send(self, client: Client, bodies: Sequence[Any], start: int, stop: int) -> None:
        client.post_all(bodies[start:stop], done=lambda index, reply: self._take(start + index, reply))

    def _take(self, index: int, reply: Reply) -> None:
        verdict, problem = self._read(reply)
        self.found[index] = verdict.probability
        if problem is not None:
            self._problems[index] = problem
        self._heard({index: verdict})

    def leave_out(self, start: int, stop: int) -> None:
        if start < stop:
            self._heard({index: Verdict(final=False) for index in range(start, stop)})

    def report(self, place: str, asked: int) -> None:
        if self._problems:
            first = self._problems[min(self._problems)]
            log.warning(
                "%s: %d of %d questions have no verdict; the first: %s", place, len(self._problems), asked, first
            )


def _text(value: Any) -> str | None:
    """The text of a chat completion; None if it is something else."""
    try:
        content = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _usage(value: Any) -> Usage:
    """What a response says that it took; 0 tokens if it says nothing."""
    usage = value.get("usage") if isinstance(value, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Usage(prompt_tokens=_count(prompt), completion_tokens=_count(completion))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
