"""Rollouts by a Hugging Face model in this process: slower than vLLM, but exactly repeatable, with nothing to start."""

from __future__ import annotations

from collections.abc import Sequence
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
from rlxf.rollout.engine import (
    Completion,
    EngineSettings,
    EngineState,
    ProbeResult,
    Sampling,
    WeightState,
    pack_rollouts,
    sample_requests,
)
from rlxf.rollout.hf_decoder import Decoder
from rlxf.sync.plan import Bucket


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

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        self._state.require_ready()
        completions: list[Completion] = []
        for requests in sample_requests(prompts, sampling, self._prompts_per_call):
            rows, seeds = zip(*requests, strict=True)
            completions += self._sample(rows, seeds, sampling, self._eos_ids)
        return pack_rollouts(prompts, sampling.num_samples, completions, self._state.version)

    def begin_update(self) -> None:
        self._state.begin()
        self._missing = set(self._parameters)

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

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        self._state.require_ready()
        sampling = Sampling(num_samples=1, max_new_tokens=num_tokens, temperature=0)
        (completion,) = self._sample(prompt.rows(), [0], sampling, eos_ids=())
        return ProbeResult(completion=completion.tokens, logps=completion.logps, policy_version=self._state.version)

    def _sample(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, eos_ids: tuple[int, ...]
    ) -> list[Completion]:
        from rlxf.rollout.hf_sampling import Sampler, sample_completions

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
