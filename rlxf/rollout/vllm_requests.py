"""The requests of a vLLM engine: its steps one by one, so that a completion is there as soon as it has ended."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlxf.core.errors import RlxfError
from rlxf.core.progress import progress
from rlxf.models.stop_strings import StopReader, StopStrings
from rlxf.rollout.engine import Completion, Sampling

_COUNTER = itertools.count()  # no two requests of this process have the same name


@dataclass(kw_only=True, slots=True)
class _Request:
    number: int  # the caller's
    reader: StopReader | None
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def take(self, output: Any) -> bool:
        """Add new tokens up to the end of the first stop string, and say whether there is one."""
        steps = output.logprobs if output.token_ids else []  # vLLM 0.23 gives all of them with no new token
        for token, step in zip(output.token_ids, steps, strict=True):
            self.tokens.append(token)
            self.logps.append(step[token].logprob)
            if self.reader is not None and self.reader.add(token):
                return True
        return False


class VllmRequests:
    """Completions of one vLLM engine. Its scheduler begins with a request as soon as there is room.

    With stop strings each token is looked at as it comes, and a request that has ended is taken back. vLLM's own stop
    strings would be another rule: it decodes the end of the prompt along with the completion.

    Args:
        engine: the ``LLMEngine``, whose scheduler is in this process.
        sampling: of all requests.
        eos_ids: tokens that end a completion.
        stops: texts that do.
    """

    def __init__(self, engine: Any, sampling: Sampling, eos_ids: tuple[int, ...], stops: StopStrings) -> None:
        self._engine, self._stops, self._form = engine, stops, sampling.structured_outputs
        self._shared = _parameters(sampling, eos_ids, in_parts=bool(stops))
        self._under_way: dict[str, _Request] = {}
        self._begin = time.perf_counter()

    @property
    def num_slots(self) -> int:
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    def add(self, number: int, prompt: list[int], seed: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(**self._shared, seed=seed, **structure(self._form))
        name = f"rlxf-{next(_COUNTER)}"
        self._under_way[name] = _Request(number=number, reader=self._stops.reader() if self._stops else None)
        self._engine.add_request(name, tokens_input(prompt), params)

    def step(self) -> list[tuple[int, Completion]]:
        progress.tick()
        if not self._engine.has_unfinished_requests():
            raise RlxfError(f"vLLM has ended all requests, but {len(self._under_way)} completions did not come")
        ended = []
        for output in self._engine.step():
            request = self._under_way[output.request_id]
            stopped = request.take(output.outputs[0])
            if stopped and not output.finished:
                self._engine.abort_request([output.request_id])
            if stopped or output.finished:
                del self._under_way[output.request_id]
                ended.append((request.number, self._completion(request)))
        return ended

    def close(self) -> None:
        if self._under_way:
            self._engine.abort_request(list(self._under_way))
        self._under_way.clear()

    def _completion(self, request: _Request) -> Completion:
        # vLLM takes out what a form forbids before it looks at the log-probs, so these are not the model's.
        logps = request.logps if self._form is None else [math.nan] * len(request.logps)
        return Completion(tokens=request.tokens, logps=logps, ended_s=time.perf_counter() - self._begin)


def _parameters(sampling: Sampling, eos_ids: tuple[int, ...], *, in_parts: bool) -> dict[str, Any]:
    """What the requests of one sampling share; ``in_parts``: vLLM hands tokens out as they come, not at the end."""
    from vllm.sampling_params import RequestOutputKind

    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),  # vLLM's "off" is 0
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # the stop ids above are the only ones
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
    }


def structure(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    """The argument of one request: vLLM notes in it what it makes of the form."""
    if wanted is None:
        return {}
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**wanted)}
