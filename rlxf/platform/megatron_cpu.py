"""megatron-core on a CPU: an import hook shows its modules a ``torch`` whose accelerator namespace is the CPU.

Scoped: only modules below ``megatron.core`` see the proxy; Ray, vLLM, transformers and user code keep the true torch.
The exceptions are three methods that megatron calls on objects (``Tensor.cuda``, ``Module.cuda``, ``Tensor.type``),
which are patched on the class and, for ``Tensor.type``, act only when the caller is megatron-core.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "eye",
    "linspace",
    "as_tensor",
    "empty_strided",
    "tril_indices",
    "triu_indices",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
]


class _Proxy(types.ModuleType):
    """A module that answers with its overrides first and with the wrapped module otherwise."""

    def __init__(self, base: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(base.__name__)
        self.__dict__["_base"] = base
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


class _NoStream:
    """Stands for streams and events: work on a CPU is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return None

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = wait_event = wait = record = synchronize = record_event = _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _on_cpu(device: Any) -> Any:
    if isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda")):
        return _CPU
    return device


def _factory(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def created(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return create(*args, **kwargs)

    return created


class _Autocast(torch.autocast):
    def __init__(self, device_type: str = "cuda", **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, **kwargs)


def _cpu_device_type(custom: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(custom)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_type") == "cuda":
            kwargs["device_type"] = "cpu"
        return custom(*args, **kwargs)

    return wrapped


def _cuda_namespace() -> _Proxy:
    ranges = {"range_push": _nothing, "range_pop": _nothing, "range": lambda *_, **__: contextlib.nullcontext()}
    overrides: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: _NoStream(),
        "default_stream": lambda *_: _NoStream(),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "is_current_stream_capturing": lambda: False,
        "nvtx": _Proxy(torch.cuda.nvtx, ranges),
    }
    return _Proxy(torch.cuda, overrides)


def _torch_for_megatron() -> _Proxy:
    overrides: dict[str, Any] = {name: _factory(getattr(torch, name)) for name in _FACTORIES}
    overrides["cuda"] = _cuda_namespace()
    overrides["autocast"] = _Autocast
    amp = {name: _cpu_device_type(getattr(torch.amp, name)) for name in ("custom_fwd", "custom_bwd")}
    overrides["amp"] = _Proxy(torch.amp, {**amp, "autocast": _Autocast})
    return _Proxy(torch, overrides)


def _patch_random(module: types.ModuleType) -> None:
    """The tracked generator *is* the CPU generator here, so a fork must save and restore one state, not two."""

    class CpuRngStatesTracker(module.CudaRNGStatesTracker):  # type: ignore[name-defined, misc]
        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was never added")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]
    module.CudaRNGStatesTracker = CpuRngStatesTracker  # type: ignore[attr-defined]


def _adapt(module: types.ModuleType, proxy: _Proxy) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = proxy
    if module.__name__ == f"{_PACKAGE}.tensor_parallel.random":
        _patch_random(module)
    if module.__name__ == f"{_PACKAGE}.jit":
        module.disable_jit_fuser()  # it would be torch.compile, which takes each process half a second to import


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, proxy: _Proxy) -> None:
        self._inner = inner
        self._proxy = proxy

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        created: types.ModuleType | None = self._inner.create_module(spec)
        return created

    def exec_module(self, module: types.ModuleType) -> None:
        self._inner.exec_module(module)
        _adapt(module, self._proxy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader, self._proxy)
        return spec


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def typed(self: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is not None:
            return original_type(self, dtype, non_blocking)
        name = original_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Optimizers and gradient clipping compare with "torch.cuda.FloatTensor" and the like.
        if isinstance(name, str) and caller.startswith(_PACKAGE) and name.count(".") == 1:
            return name.replace("torch.", "torch.cuda.")
        return name

    torch.Tensor.type = typed  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def install() -> None:
    """Install the bridge once. Modules that another library imported already (accelerate does) are adapted in place."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # anything else: each process would compile it again
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True  # it read the variable when it was imported
    # megatron-core warns at import that Transformer Engine and Apex are missing; that is expected.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # A CUDA build of torch warns that it finds no CUDA runtime; that is expected, too.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    proxy = _torch_for_megatron()
    sys.meta_path.insert(0, _Finder(proxy))
    for name, module in list(sys.modules.items()):
        if name == _PACKAGE or name.startswith(_PACKAGE + "."):
            _adapt(module, proxy)
    _patch_tensor_methods()
