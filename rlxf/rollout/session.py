"""Sessions: prompts go in, and each comes back as soon as all of its completions have ended.

``RequestSession`` is the session of an engine that ends completions one by one (``Requests``), ``WholeSession`` of an
engine that has only whole answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import torch

from rlxf.core.errors import SyncError
from rlxf.core.types import PromptBatch, Rollouts, Text, Tokens
from rlxf.rollout.engine import Completion, Sampling, Session, pack_rollouts, sample_requests


class Requests(Protocol):
    """The completions that an engine has under way. Each has a number, which the caller gives it."""

    @property
    def num_slots(self) -> int | None:
        """How many it decodes at the same time at most; None: all that wait when it begins with them."""
        ...

    def add(self, number: int, prompt: list[int], seed: int) -> None: ...

    def step(self) -> list[tuple[int, Completion]]:
        """Sample a token of each completion, or begin with those that wait; number and completion of what has ended."""
        ...

    def close(self) -> None:
        """Drop everything: nothing runs on in the engine. It may be called again."""
        ...


def complete(requests: Requests, calls: Iterable[Sequence[tuple[list[int], int]]]) -> list[Completion]:
    """A completion for each prompt and seed, in their order; one call has ended before the next one begins.

    The requests are closed at the end, also after an error.
    """
    found: dict[int, Completion] = {}
    numbers = count()
    try:
        for call in calls:
            for prompt, seed in call:
                requests.add(next(numbers), prompt, seed)
            wanted = len(found) + len(call)
            while len(found) < wanted:
                found.update(requests.step())
    finally:
        requests.close()
    return [found[number] for number in range(len(found))]


@dataclass(kw_only=True, slots=True)
class _Prompt:
    """One prompt of a session, and those of its completions that have ended, by their sample index."""

    tokens: list[int]
    row_id: int
    position: int
    text: Text
    columns: dict[str, Any]
    completions: dict[int, Completion] = field(default_factory=dict)


class RequestSession:
    """The session of an engine that ends completions one by one.

    Args:
        requests: of the engine; the session closes them.
        sampling: of every prompt.
        version: of the weights that sample.
    """

    def __init__(self, requests: Requests, sampling: Sampling, version: int) -> None:
        self._requests, self._sampling, self._version = requests, sampling, version
        self._under_way: dict[int, _Prompt] = {}  # by a number that counts the prompts that were added
        self._added = 0
        self._open = True

    @property
    def num_slots(self) -> int | None:
        return self._requests.num_slots

    def add(self, prompts: PromptBatch) -> None:
        _require_open(self._open)
        first, samples = self._added, self._sampling.num_samples
        for prompt in _each(prompts):
            self._under_way[self._added] = prompt
            self._added += 1
        with self._nothing_left_behind():
            for call in sample_requests(prompts, self._sampling, None):
                for number, (row, seed) in enumerate(call, first * samples):
                    self._requests.add(number, row, seed)

    def advance(self) -> Rollouts | None:
        _require_open(self._open)
        samples = self._sampling.num_samples
        with self._nothing_left_behind():
            while self._under_way:
                whole: list[int] = []
                for number, completion in self._requests.step():
                    completions = self._under_way[number // samples].completions
                    completions[number % samples] = completion
                    if len(completions) == samples:
                        whole.append(number // samples)
                if whole:
                    return self._pack([self._under_way.pop(number) for number in sorted(whole)])
        return None

    def close(self) -> None:
        self._open = False
        self._under_way.clear()
        self._requests.close()

    @contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # a stop that the user asked for, among others
            self.close()
            raise

    def _pack(self, prompts: list[_Prompt]) -> Rollouts:
        samples = self._sampling.num_samples
        completions = [prompt.completions[k] for prompt in prompts for k in range(samples)]
        return pack_rollouts(_batch(prompts), samples, completions, self._version)


class WholeSession:
    """The session of an engine that has only whole answers: what was added at once comes back at once.

    Args:
        generate: the engine's; it is called by ``advance``.
        sampling: of every prompt.
    """

    num_slots = None  # all that were added

    def __init__(self, generate: Callable[[PromptBatch, Sampling], Rollouts], sampling: Sampling) -> None:
        self._generate, self._sampling = generate, sampling
        self._waiting = deque[PromptBatch]()
        self._open = True

    def add(self, prompts: PromptBatch) -> None:
        _require_open(self._open)
        if len(prompts):
            self._waiting.append(prompts)

    def advance(self) -> Rollouts | None:
        _require_open(self._open)
        if not self._waiting:
            return None
        try:
            return self._generate(self._waiting.popleft(), self._sampling)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open = False
        self._waiting.clear()


class OpenSession:
    """The session that an engine has open. There is at most one."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def open(self, session: Session) -> Session:
        """Close the one before it."""
        self.close()
        self._session = session
        return session

    def close(self) -> None:
        """Close it if there is one."""
        if self._session is not None:
            self._session.close()
        self._session = None


def _require_open(is_open: bool) -> None:
    if not is_open:
        raise SyncError(
            "this session of the rollout engine is closed: an update, another session, a whole batch or a probe began, "
            "or sampling failed; open a new one with session(sampling) and add the missing prompts to it"
        )


def _each(prompts: PromptBatch) -> Iterator[_Prompt]:
    rows, positions = prompts.row_ids.tolist(), prompts.positions.tolist()
    for index, tokens in enumerate(prompts.prompts.rows()):
        columns = {name: values[index] for name, values in prompts.columns.items()}
        text = prompts.texts[index]
        yield _Prompt(tokens=tokens, row_id=rows[index], position=positions[index], text=text, columns=columns)


def _batch(prompts: list[_Prompt]) -> PromptBatch:
    return PromptBatch(
        prompts=Tokens.from_rows([prompt.tokens for prompt in prompts]),
        row_ids=torch.tensor([prompt.row_id for prompt in prompts], dtype=torch.int64),
        positions=torch.tensor([prompt.position for prompt in prompts], dtype=torch.int64),
        texts=tuple(prompt.text for prompt in prompts),
        columns={name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns},
    )
