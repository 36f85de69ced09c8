"""Rollouts by Hugging Face ``generate``: the exact twin of the vLLM engine, with nothing to install or to start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.errors import ConfigError, SyncError
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from rlxf.platform.base import Platform
from rlxf.platform.linear import route_linears
from rlxf.rollout.engine import Completion, ProbeResult, Sampling, WeightState, pack_rollouts, sample_requests
from rlxf.sync.plan import Bucket
from rlxf.types import PromptBatch, Rollouts, Tokens


class HfEngine:
    """One model in this process. A row's randomness is its own, so its completion does not depend on the batch."""

    def __init__(self, config: RunConfig, platform: Platform) -> None:
        actor = config.actor_rollout
        if actor.load is None:
            raise ConfigError("actor_rollout.load is not set; rollout.engine=hf needs a Hugging Face model folder")
        trust = config.training.trust_remote_code
        load_hf_config(
            actor.load, trust_remote_code=trust
        )  # a clear error for a wrong folder, before transformers' own
        self._device = platform.set_device(0)
        self._model = _load_model(actor.load, "bfloat16" if actor.bf16 else "float32", trust).to(self._device)
        route_linears(self._model, platform.linear)
        tokenizer = load_tokenizer(actor.tokenizer_name_or_path or actor.load, trust_remote_code=trust)
        self._eos_ids = eos_token_ids(actor.load, tokenizer)
        self._prompts_per_call = actor.num_samples_per_step
        self._parameters = dict(self._model.named_parameters())  # a tied head is in it once, as the embedding
        self._missing: set[str] = set()
        self._state = WeightState()

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        self._state.require_whole()
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
                raise SyncError(f"an update ended without {len(self._missing)} weights: {min(self._missing)}, ...")
        self._state.end(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        self._state.require_whole()
        sampling = Sampling(num_samples=1, max_new_tokens=num_tokens, temperature=0)
        (completion,) = self._sample(prompt.rows(), [0], sampling, eos_ids=())
        return ProbeResult(completion=completion.tokens, logps=completion.logps, policy_version=self._state.version)

    @torch.inference_mode()
    def _sample(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, eos_ids: tuple[int, ...]
    ) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(row) for row in rows)
        pad = eos_ids[0] if eos_ids else 0
        tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=self._device)  # [B, T]
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(width, device=self._device) >= (width - lengths)[:, None]  # [B, T], padding on the left
        sampler = _Sampler(seeds, sampling, self._model.config.get_text_config().vocab_size)
        self._model.generate(
            tokens,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad,
                eos_token_id=list(eos_ids) or None,
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )  # fmt: skip
        return sampler.completions(eos_ids, sampling.max_new_tokens)


class _Sampler:
    """The one logits processor: decides each token by itself, so that ``generate`` only has to take the largest score.

    Sampling is argmax(logits / temperature + Gumbel noise), the noise of a row from that row's own generator.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, vocab_size: int) -> None:
        self._warpers = _warpers(sampling)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []
        self._noise = torch.empty(len(self._generators), vocab_size)
        self._tokens: list[Tensor] = []  # [B] int64 each
        self._logps: list[Tensor] = []  # [B] float32 each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raw = scores  # [B, V] float32
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        if self._generators:
            for row, generator in zip(self._noise, self._generators, strict=True):
                row.exponential_(generator=generator)
            scores = scores - self._noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)
        chosen = scores.argmax(dim=-1)
        self._tokens.append(chosen)
        self._logps.append(raw.gather(1, chosen[:, None])[:, 0] - raw.logsumexp(dim=-1))
        return scores

    def completions(self, eos_ids: tuple[int, ...], max_new_tokens: int) -> list[Completion]:
        """Each row up to its first EOS; what ``generate`` computed for a row after that is dropped."""
        tokens = torch.stack(self._tokens, dim=1)[:, :max_new_tokens].tolist()
        logps = torch.stack(self._logps, dim=1).tolist()
        rows = []
        for row, row_logps in zip(tokens, logps, strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
            rows.append(Completion(tokens=row[:stop], logps=row_logps[:stop]))
        return rows


def _warpers(sampling: Sampling) -> list[Any]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _load_model(folder: str, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # under runtime=local it would stand among the run's own lines
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, local_files_only=True
    )
    model.generation_config = GenerationConfig()  # the folder's own defaults (penalties, stop ids) must not mix in
    return model.eval().requires_grad_(False)
