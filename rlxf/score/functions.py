"""Scoring with a Python function from a file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.core.errors import ConfigError, RlxfError, ScoreError
from rlxf.core.types import Rollouts, Text
from rlxf.core.user_file import describe, load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIGNATURE = "def reward(prompts, completions, completion_ids, **columns) -> list[float | None]"
_FLOAT32_MAX = torch.finfo(torch.float32).max
_GIVEN = ("prompts", "completions", "completion_ids")


class FunctionScorer:
    """Calls ``reward`` of the file ``reward.function``, with TRL's arguments, once for all completions of a step.

    ``prompts`` and ``completions`` are strings, or chat messages where the prompt is a chat; ``completion_ids`` are the
    sampled token ids, without padding; each further column of the data file comes as a keyword, with one value per
    completion. The function returns a number per completion, or None where it has no score.

    Args:
        path: ``reward.function``.
        tokenizer: the policy's.

    Raises:
        ConfigError: the file or the function is missing or wrong, or does not take what the data has.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path = path
        self._function = load_function(self._path, "reward", key="reward.function", signature=_SIGNATURE)
        self._require_accepts(dict.fromkeys(_GIVEN), complete=False)  # the data's columns are not known yet
        self._tokenizer = tokenizer

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores; NaN where the function returned None.

        Raises:
            ScoreError: the function failed, or what it returned is not one score per completion.
        """
        prompt_rows = rollouts.prompt_index.tolist()
        prompts = [rollouts.prompts.texts[row] for row in prompt_rows]
        ids = rollouts.sequences.completion_rows()
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        arguments: dict[str, Any] = {
            "prompts": [_copy(prompt) for prompt in prompts],
            "completions": [_reply(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
            "completion_ids": ids,
        }
        for name, values in rollouts.prompts.columns.items():
            if name in arguments:
                raise ConfigError(f"actor_rollout.data_path: rename column {name!r}; {self._name} gets its own {name}")
            arguments[name] = [values[row] for row in prompt_rows]
        self._require_accepts(arguments, complete=True)
        return self._scores(self._call(arguments), len(rollouts))

    @property
    def _name(self) -> str:
        return f"reward.function={self._path}"

    def _require_accepts(self, arguments: dict[str, Any], *, complete: bool) -> None:
        signature = inspect.signature(self._function)
        try:
            (signature.bind if complete else signature.bind_partial)(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self._name}: `reward` cannot be called with {', '.join(arguments)}: {error}; expected `{_SIGNATURE}`"
            ) from error

    def _call(self, arguments: dict[str, Any]) -> Any:
        try:
            result = self._function(**arguments)
            return list(result) if isinstance(result, Iterable) else result  # a generator fails only here
        except RlxfError:  # a stop request reached the program inside the function
            raise
        except Exception as error:
            raise ScoreError(f"{self._name}: `reward` failed: {describe(error, self._path)}") from error

    def _scores(self, result: Any, count: int) -> Tensor:
        """The function's answer as scores, once it is one finite number or None per completion."""
        if not isinstance(result, list):
            raise ScoreError(f"{self._name}: expected a list of {count} scores, got {type(result).__name__}")
        if len(result) != count:
            raise ScoreError(f"{self._name}: expected {count} scores, one per completion, got {len(result)}")
        scores = []
        for index, value in enumerate(result):
            try:
                score = math.nan if value is None else float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ScoreError(f"{self._name}: score {index} must be a number or None, got {value!r}") from error
            if isinstance(value, str) or abs(score) > _FLOAT32_MAX:
                raise ScoreError(f"{self._name}: score {index} must be a finite number or None, got {value!r}")
            scores.append(score)
        return torch.tensor(scores, dtype=torch.float32)


def _copy(text: Text) -> Text:
    """A copy for the user's function, which may change its messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _reply(prompt: Text, completion: str) -> Text:
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
