"""Rollouts by a Hugging Face model in this process: slower than vLLM, but exactly repeatable, with nothing to start."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.core.model_folder import megatron_checkpoint
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.megatron.families import family_of
from rlxf.models.stop_strings import StopStrings
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from rlxf.platform.base import Platform
from rlxf.platform.memory import PhaseMemory
from rlxf.platform.visible import visible_device
from rlxf.rollout.engine import (
    Completion,
    EngineSettings,
    EngineState,
    ProbeResult,
    Sampling,
    Session,
    WeightState,
    pack_rollouts,
    sample_requests,
)
from rlxf.rollout.hf_decoder import Decoder
from rlxf.rollout.session import OpenSession, RequestSession, complete
from rlxf.rollout.waking import take_memory
from rlxf.sync.checksums import Checksums, checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace, Transport

Ending = Generator[list[tuple[int, Completion]], None, None]
"""Numbers and completions of rows, each time that some have ended."""


class HfEngine:
    """One model in this process. Each row has its own random numbers, so its completion is the same in any batch."""

    def __init__(self, settings: EngineSettings, platform: Platform) -> None:
        folder, trust = settings.model, settings.trust_remote_code
        # A clear error for a wrong folder, before transformers' own, and for a model that the decoder does not compute.
        family_of(load_hf_config(folder, trust_remote_code=trust), folder)
        self._device = platform.set_device(0)
        model = _load_model(folder, settings.dtype, trust).to(self._device)
        self._decoder = Decoder(model, platform.linear)
        self._platform = platform
        tokenizer = load_tokenizer(settings.tokenizer, trust_remote_code=trust)
        self._eos_ids = eos_token_ids(folder, tokenizer, settings.eos_tokens)
        self._tokenizer = tokenizer
        self._prompts_per_call = settings.prompts_per_call
        self._parameters = dict(model.named_parameters())  # a tied head is in it once, as the embedding
        self._missing: set[str] = set()
        waits = settings.stale or megatron_checkpoint(Path(folder)) is not None  # the first push brings the weights
        self._state = WeightState(EngineState.STALE if waits else EngineState.READY)
        self._open = OpenSession()
        self._receiver: Receiver | None = None  # once it is connected with the actor
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self.memory = PhaseMemory(platform)
        if settings.colocated:
            self.memory.end("load")

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        self._open.close()
        self._state.require_ready()
        calls = sample_requests(prompts, sampling, self._prompts_per_call)
        completions = complete(self._requests(sampling, self._eos_ids), calls)
        return pack_rollouts(prompts, sampling.num_samples, completions, self._state.version)

    def session(self, sampling: Sampling) -> Session:
        self._open.close()
        self._state.require_ready()
        return self._open.open(RequestSession(self._requests(sampling, self._eos_ids), sampling, self._state.version))

    def begin_update(self) -> None:
        self._open.close()
        self._state.begin()
        self._missing = set(self._parameters)

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        if self._receiver is not None:
            self._receiver.close()
        where = visible_device(self._platform, 0)
        place = ReceiverPlace(number=first, platform=self._platform, device=self._device, where=where, host=host)
        self._receiver = transport.receiver(address, place)

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        assert self._receiver is not None  # connected
        with self._state.receiving():
            payload = self._receiver.receive(bucket, message)
        self.load_bucket(bucket, payload)
        self._platform.synchronize()  # the sender may use the memory again
        return [checksums(bucket, payload)] if check else []

    @torch.no_grad()
    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        with self._state.receiving():
            for name, tensor in bucket.views(payload):
                parameter = self._parameters.get(name)
                if parameter is None or parameter.shape != tensor.shape:
                    expected = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                    raise SyncError(f"weight sync sent {name} {tuple(tensor.shape)}; the rollout model has {expected}")
                parameter.copy_(tensor)
                self._missing.discard(name)

    def end_update(self, version: int) -> None:
        with self._state.receiving():
            if self._missing:
                raise SyncError(
                    f"an update ended, but {len(self._missing)} weights did not arrive: {min(self._missing)}, ..."
                )
            self._decoder.refresh()
        self._state.end(version)

    def sleep(self) -> None:
        self._state.sleep(self._free)

    def wake_weights(self) -> None:
        self._state.wake_weights(self._wake)

    def wake_cache(self) -> None:
        """The cache belongs to a session, so there is none to wake."""
        self._state.wake_cache()
        self.memory.end("push")

    def _free(self) -> None:
        """Buffers stay: nothing would bring them back."""
        self._open.close()
        self._decoder.drop_copies()
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)
        self._platform.synchronize()
        self._platform.empty_cache()
        self.memory.end("sample")

    def _wake(self) -> None:
        self.memory.end("asleep")
        take_memory(self._allocate, "weights", self._platform, self.memory)

    def _allocate(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.shape != self._shapes[name]:
                parameter.data = parameter.data.new_empty(self._shapes[name])

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        self._open.close()
        self._state.require_ready()
        sampling = Sampling(num_samples=1, max_new_tokens=num_tokens, temperature=0)
        (completion,) = complete(self._requests(sampling, eos_ids=()), [[(row, 0) for row in prompt.rows()]])
        return ProbeResult(completion=completion.tokens, logps=completion.logps, policy_version=self._state.version)

    def _requests(self, sampling: Sampling, eos_ids: tuple[int, ...]) -> HfRequests:
        from rlxf.rollout.hf_sampling import Sampler, sample_completions

        def sample(rows: Sequence[list[int]], seeds: Sequence[int]) -> Ending:
            return sample_completions(
                self._decoder,
                rows,
                Sampler(seeds, sampling, rows),
                max_new_tokens=sampling.max_new_tokens,
                eos_ids=eos_ids,
                stops=StopStrings(self._tokenizer, sampling.stop),
                platform=self._platform,
                device=self._device,
            )

        size = None if self._prompts_per_call is None else self._prompts_per_call * sampling.num_samples
        return HfRequests(sample, num_slots=size)


class HfRequests:
    """Completions of one model, in calls: what is added in the middle of a call waits for the next one.

    Args:
        sample: a call. It takes prompts and their seeds, and gives completions as they end.
        num_slots: completions of one call; None: all that wait.
    """

    def __init__(
        self, sample: Callable[[Sequence[list[int]], Sequence[int]], Ending], *, num_slots: int | None
    ) -> None:
        self.num_slots = num_slots
        self._sample = sample
        self._waiting: list[tuple[int, list[int], int]] = []
        self._call: Ending | None = None
        self._numbers: list[int] = []  # of the call's rows
        self._left = 0  # rows of the call that have not ended
        self._begin = time.perf_counter()

    def add(self, number: int, prompt: list[int], seed: int) -> None:
        self._waiting.append((number, prompt, seed))

    def step(self) -> list[tuple[int, Completion]]:
        if self._call is None:
            begun = self._waiting[: self.num_slots]
            del self._waiting[: self.num_slots]
            self._numbers, self._left = [number for number, _, _ in begun], len(begun)
            self._call = self._sample([prompt for _, prompt, _ in begun], [seed for _, _, seed in begun])
        ended, ended_s = next(self._call), time.perf_counter() - self._begin
        self._left -= len(ended)
        if not self._left:
            self._end_call()
        return [(self._numbers[row], replace(completion, ended_s=ended_s)) for row, completion in ended]

    def close(self) -> None:
        self._waiting.clear()
        self._end_call()

    def _end_call(self) -> None:
        """The call's memory is free from here on."""
        if self._call is not None:
            self._call.close()
        self._call = None


def _load_model(folder: str, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # under runtime=local it would mix with the run's lines
    if megatron_checkpoint(Path(folder)) is not None:
        settings = load_hf_config(folder, trust_remote_code=trust_remote_code)
        empty = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
        return empty.eval().requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, local_files_only=True
    )
    return model.eval().requires_grad_(False)
