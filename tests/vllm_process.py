"""vLLM engines in a process of their own, as a CPU vLLM needs it; each proxy speaks the rollout engine's protocol."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

from torch import Tensor

from rlxf.assembly.roles import engine_settings
from rlxf.config.schema import RunConfig
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.platform import get_platform
from rlxf.rollout.engine import ProbeResult, Sampling
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Transport

_DEADLINE_S = 240  # a start on busy cores


class VllmProcess:
    """Starts with one engine per recipe; ``engine(index)`` is what a test talks to."""

    def __init__(self, *configs: RunConfig, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, [config.dump() for config in configs]))
        platform = get_platform("cpu").rollout_environment(1, 1)
        with patch.dict(os.environ, {**platform, **environment}):  # torch reads OpenMP's when the child imports it
            self._process.start()
        remote.close()
        self._receive()

    def engine(self, index: int) -> VllmProxy:
        return VllmProxy(self, index)

    def call(self, index: int, method: str, *args: Any) -> Any:
        self._connection.send((index, method, args))
        return self._receive()

    def close(self) -> None:
        """Its own end takes vLLM seconds; killed, it leaves nothing behind either (its workers watch it)."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        assert self._connection.poll(_DEADLINE_S), "the vLLM process did not answer"
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class VllmProxy:
    """One engine of the process."""

    def __init__(self, process: VllmProcess, index: int) -> None:
        self._process = process
        self._index = index

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self._call("generate", prompts, sampling)

    def session(self, sampling: Sampling) -> VllmProxySession:
        return VllmProxySession(self._process, self._index, self._call("open_session", sampling))

    def begin_update(self) -> None:
        self._call("begin_update")

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        self._call("open_receivers", transport, address, first, host)

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        return self._call("receive", bucket, message, check)

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        self._call("load_bucket", bucket, payload)

    def end_update(self, version: int) -> None:
        self._call("end_update", version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self._call("probe", prompt, num_tokens)

    def sleep(self) -> None:
        self._call("sleep")

    def wake_weights(self) -> None:
        self._call("wake_weights")

    def wake_cache(self) -> None:
        self._call("wake_cache")

    def num_unfinished(self) -> int:
        """Requests that vLLM has under way."""
        return self._call("num_unfinished")

    def memory(self) -> tuple[int, int, int]:
        """Blocks of the cache, tokens of a block, and bytes of the parameters, as vLLM has them."""
        return self._call("memory")

    def set_prompts_per_call(self, count: int | None) -> None:
        self._call("set_prompts_per_call", count)

    def forget(self, step: str | None) -> None:
        """From now on leave out one step of an update: "head" or "prefix cache"; None: leave out nothing."""
        self._call("forget", step)

    def _call(self, method: str, *args: Any) -> Any:
        return self._process.call(self._index, method, *args)


class VllmProxySession:
    """One session of an engine of the process; the process knows it by its number."""

    def __init__(self, process: VllmProcess, index: int, number: int) -> None:
        self._process, self._index, self._number = process, index, number

    @property
    def num_slots(self) -> int | None:
        return self._call("num_slots")

    def add(self, prompts: PromptBatch) -> None:
        self._call("add", prompts)

    def advance(self) -> Rollouts | None:
        return self._call("advance")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *args: Any) -> Any:
        return self._process.call(self._index, "in_session", self._number, method, *args)


_SESSIONS: list[Any] = []  # of the process with the engines, in the order in which they were opened


def _serve(connection: Connection, configs: list[dict[str, Any]]) -> None:
    from rlxf.rollout.vllm import VllmEngine

    try:
        recipes = [RunConfig.model_validate(config, strict=False) for config in configs]
        engines = [VllmEngine(engine_settings(recipe), get_platform("cpu")) for recipe in recipes]
        connection.send("ready")
    except Exception as error:  # noqa: BLE001  handed to the test
        connection.send(error)
        return
    while True:
        try:
            index, method, args = connection.recv()
        except EOFError:
            return
        try:
            answer = _answer(engines[index], method, args)
        except Exception as error:  # noqa: BLE001  handed to the test
            answer = error
        connection.send(answer)


def _answer(engine: Any, method: str, args: tuple[Any, ...]) -> Any:
    if method == "set_prompts_per_call":
        (engine._prompts_per_call,) = args
        return None
    if method == "open_session":
        _SESSIONS.append(engine.session(*args))
        return len(_SESSIONS) - 1
    if method == "in_session":
        number, name, *rest = args
        found = getattr(_SESSIONS[number], name)
        return found(*rest) if callable(found) else found
    if method == "num_unfinished":
        return engine._llm.llm_engine.get_num_unfinished_requests()
    if method == "memory":
        cache = engine._llm.llm_engine.vllm_config.cache_config
        (weights,) = engine._llm.apply_model(_parameter_bytes)
        return cache.num_gpu_blocks, cache.block_size, weights
    if method == "check_form":
        from rlxf.rollout.vllm import _check_structure

        return _check_structure(engine._llm, *args)
    if method == "forget":
        return _forget(engine, *args)
    if method == "receive":
        bucket, message, check = args
        return engine.receive(bucket, message, check=check)
    if method == "load_bucket":
        bucket, payload = args
        engine.load_bucket(bucket, payload)
        payload.zero_()  # a sender may reuse its memory at once
        return None
    return getattr(engine, method)(*args)


def _parameter_bytes(model: Any) -> int:
    return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())


def _forget(engine: Any, step: str | None) -> None:
    from rlxf.rollout import vllm_worker

    if not hasattr(vllm_worker, "kept"):
        vllm_worker.kept = vllm_worker.repack_tied_head
    vllm_worker.repack_tied_head = (lambda model: None) if step == "head" else vllm_worker.kept
    engine._llm.__dict__.pop("reset_prefix_cache", None)
    if step == "prefix cache":
        engine._llm.reset_prefix_cache = lambda: True
