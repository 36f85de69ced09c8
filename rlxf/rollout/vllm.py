"""Rollouts by vLLM: token ids in, token ids and raw log-probs out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlxf.core.errors import ConfigError, RlxfError, SyncError
from rlxf.core.model_folder import assets_folder, megatron_checkpoint
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.stop_strings import StopStrings
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from rlxf.platform.base import Platform
from rlxf.platform.environment import with_exports
from rlxf.platform.memory import PhaseMemory
from rlxf.rollout.engine import (
    EngineSettings,
    EngineState,
    ProbeResult,
    Sampling,
    Session,
    WeightState,
    pack_rollouts,
    sample_requests,
)
from rlxf.rollout.session import OpenSession, RequestSession, complete
from rlxf.rollout.vllm_requests import VllmRequests, structure
from rlxf.rollout.vllm_sleep import map_memory, map_once
from rlxf.rollout.waking import take_memory
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Transport

_WORKER_EXTENSION = "rlxf.rollout.vllm_worker.WeightLoader"
_BLOCKS_FOR_PROBE = 2
_USUAL_SHARE = 0.85  # of a device's memory, if nobody has planned it; on a CPU it decides nothing


class VllmEngine:
    """One vLLM engine whose scheduler lives in this process; workers of tensor parallelism are processes of their own.

    On a CPU nothing else may compute in the process: vLLM rebinds its threads and memory.
    """

    def __init__(self, settings: EngineSettings, platform: Platform) -> None:
        folder, trust = settings.model, settings.trust_remote_code
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        cache = settings.rollout.cpu_kv_cache_gib
        prepare_environment(platform.rollout_environment(threads, cache, colocated=settings.colocated))
        positions = load_hf_config(folder, trust_remote_code=trust).get_text_config().max_position_embeddings
        tokenizer = load_tokenizer(settings.tokenizer, trust_remote_code=trust)
        self._eos_ids = eos_token_ids(folder, tokenizer, settings.eos_tokens)
        self._tokenizer = tokenizer
        self._platform = platform
        self._prompts_per_call = settings.prompts_per_call
        waits = settings.stale or megatron_checkpoint(Path(folder)) is not None  # the first push brings the weights
        self._state = WeightState(EngineState.STALE if waits else EngineState.READY)
        self._open = OpenSession()
        probe_length = _BLOCKS_FOR_PROBE * platform.kv_block_size
        self._llm = _start(settings, platform, max_model_len=min(positions, max(settings.max_length, probe_length)))
        if platform.vllm_sampler is not None:
            self._llm.collective_rpc("rlxf_draw_all_rows_at_once", args=(platform.vllm_sampler,))
        if settings.rollout.structured_outputs is not None:
            _check_structure(self._llm, settings.rollout.structured_outputs)
        _check_block_size(self._llm, platform.kv_block_size)
        self._sleep_level = _prepare_sleep(self._llm, settings, platform)
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
        """What is added joins the requests that are under way, whatever ``prompts_per_call`` says."""
        self._open.close()
        self._state.require_ready()
        return self._open.open(RequestSession(self._requests(sampling, self._eos_ids), sampling, self._state.version))

    def begin_update(self) -> None:
        self._open.close()
        self._state.begin()
        self._llm.collective_rpc("rlxf_begin_update")

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        self._llm.collective_rpc("rlxf_open_receiver", args=(transport, address, first, host, self._platform))

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        found = self._load(bucket, "rlxf_receive", message, check)
        return found if check else []

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        # As an array: no copy in this process, and one plain buffer on the way to worker processes.
        self._load(bucket, "rlxf_load_bucket", payload.cpu().numpy())

    def _load(self, bucket: Bucket, method: str, *args: Any) -> list[Any]:
        """What the engine's processes answer."""
        with self._state.receiving():
            try:
                found: list[Any] = self._llm.collective_rpc(method, args=(bucket, *args))
            except RlxfError:
                raise  # a stop that the user asked for, among others
            except Exception as error:
                names = f"{bucket.tensors[0].name} to {bucket.tensors[-1].name}"
                raise SyncError(f"vLLM did not take the weights {names}: {type(error).__name__}: {error}") from error
        return found

    def end_update(self, version: int) -> None:
        with self._state.receiving():
            self._llm.collective_rpc("rlxf_end_update")
            if not self._llm.reset_prefix_cache():
                raise SyncError(f"version {version}: vLLM did not reset its prefix cache; requests are still running")
        self._state.end(version)

    def sleep(self) -> None:
        self._state.sleep(self._free)

    def wake_weights(self) -> None:
        self._state.wake_weights(lambda: self._wake("weights", "asleep"))

    def wake_cache(self) -> None:
        """Its prefixes were forgotten when the engine went to sleep, and nothing was sampled since."""
        self._state.wake_cache(lambda: self._wake("kv_cache", "push"))

    def _free(self) -> None:
        self._open.close()
        if self._sleep_level is not None:
            self._llm.sleep(level=self._sleep_level)
        self._platform.empty_cache()
        self.memory.end("sample")

    def _wake(self, tag: str, phase: str) -> None:
        """Take the memory of one of vLLM's tags again, at the end of a phase."""
        self.memory.end(phase)
        if self._sleep_level is None:
            return
        take_memory(lambda: self._map(tag), tag.replace("_", " "), self._platform, self.memory)
        self._llm.wake_up(tags=[tag])
        if tag == "kv_cache" and self._llm.llm_engine.is_sleeping():  # vLLM only warns of what it cannot wake
            raise SyncError("vLLM is still asleep after its weights and its cache woke; start the run again")

    def _map(self, tag: str) -> None:
        """On every worker; one that has its memory already keeps it."""
        for failure in self._llm.collective_rpc(map_memory, args=(tag, self._platform.name)):
            if failure is not None:
                raise MemoryError(failure)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        self._open.close()
        self._state.require_ready()
        sampling = Sampling(num_samples=1, max_new_tokens=num_tokens, temperature=0)
        (completion,) = complete(self._requests(sampling, eos_ids=()), [[(row, 0) for row in prompt.rows()]])
        return ProbeResult(completion=completion.tokens, logps=completion.logps, policy_version=self._state.version)

    def _requests(self, sampling: Sampling, eos_ids: tuple[int, ...]) -> VllmRequests:
        return VllmRequests(self._llm.llm_engine, sampling, eos_ids, StopStrings(self._tokenizer, sampling.stop))


def prepare_environment(expected: Mapping[str, str]) -> None:
    """Set what vLLM reads when it is imported, unless the process was started with it.

    Raises:
        ConfigError: vLLM was imported without these variables, or one of its own was set to something else.
    """
    wanted = with_exports(expected, os.environ)
    late = [name for name in wanted if name not in os.environ] if "vllm" in sys.modules else []
    if late:
        raise ConfigError(
            f"vLLM was imported before {', '.join(late)} were set; start the engine in a process of its own"
        )
    for name, value in wanted.items():
        found = os.environ.setdefault(name, value)
        if found != value:
            raise ConfigError(f"environment variable {name}={found}: this recipe needs {value}; unset it")


def _start(settings: EngineSettings, platform: Platform, *, max_model_len: int) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine=vllm: vLLM cannot be imported ({error}); install the {platform.name} extra, "
            "or set rollout.engine=hf"
        ) from error
    folder, ranks = Path(settings.model), settings.num_devices
    return LLM(
        str(assets_folder(folder)),
        **_tokenizer_arguments(settings),
        load_format="auto" if megatron_checkpoint(folder) is None else "dummy",  # the first push fills it
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else "uni",
        max_model_len=max_model_len,
        gpu_memory_utilization=settings.rollout.gpu_memory_utilization or _USUAL_SHARE,
        enable_prefix_caching=True,
        logprobs_mode="raw_logprobs",
        generation_config="vllm",  # the folder's sampling defaults must not mix in
        worker_extension_cls=_WORKER_EXTENSION,
        use_tqdm_on_load=False,
        **_arguments(settings, platform),
    )


def _arguments(settings: EngineSettings, platform: Platform) -> dict[str, Any]:
    """What depends on the device; the recipe's word counts first."""
    arguments = platform.vllm_arguments(colocated=settings.colocated)
    limit = settings.rollout.max_num_seqs
    return arguments if limit is None else arguments | {"max_num_seqs": limit}


def _prepare_sleep(llm: Any, settings: EngineSettings, platform: Platform) -> int | None:
    """How deep it sleeps. None: it only keeps the order, for it was built without vLLM's sleep and shares no device."""
    if not settings.colocated or platform.vllm_sleep_level is None:
        return None
    if platform.vllm_allocator is not None:
        llm.collective_rpc(map_once, args=(platform.vllm_allocator,))
    return platform.vllm_sleep_level


def _check_block_size(llm: Any, expected: int) -> None:
    found = llm.llm_engine.vllm_config.cache_config.block_size
    if found > expected:
        raise ConfigError(
            f"vLLM keeps {found} tokens per cache block, the platform says {expected}: a sync probe would fit into one "
            "block and could not see a stale prefix cache"
        )


def _tokenizer_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM gets and gives token ids; it needs a tokenizer only to follow a form."""
    if settings.rollout.structured_outputs is None:
        return {"skip_tokenizer_init": True}
    return {"tokenizer": str(assets_folder(Path(settings.tokenizer)))}


def _check_structure(llm: Any, wanted: Mapping[str, Any]) -> None:
    """Have vLLM read the form at the start, and not in the first request.

    Raises:
        ConfigError: vLLM cannot follow it.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params, config = SamplingParams(**structure(wanted)), llm.llm_engine.vllm_config
    try:
        params._validate_structured_outputs(config.model_config, config.structured_outputs_config, llm.get_tokenizer())
    except ImportError as error:  # vLLM 0.32 imports all of its libraries for forms, also those that it does not use
        raise ConfigError(
            f"rollout.structured_outputs: vLLM needs a package that is not installed ({error}); install what your vLLM "
            "requires for it (0.32: lm-format-enforcer, xgrammar, llguidance), or remove the key"
        ) from error
    except (VLLMValidationError, ValueError) as error:
        raise ConfigError(
            f"rollout.structured_outputs = {json.dumps(dict(wanted))[:200]}: vLLM cannot follow it "
            f"({' '.join(str(error).split())[:300]}); change it, or remove it"
        ) from error
