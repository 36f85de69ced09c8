"""How many bytes a real pass keeps for its backward pass, by component, and how many tensors there are at most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a module keeps, by the end of its name (``rlxf/planner/activations.py``).
COMPONENTS = {
    "word_embeddings": "positions",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "final_layernorm": "norms",
    "linear_qkv": "linear inputs",
    "linear_fc1": "linear inputs",
    "q_layernorm": "head norms",
    "k_layernorm": "head norms",
    "self_attention": "attention",  # what is computed again
    "core_attention": "attention",
    "linear_proj": "projection in",
    "activation_func": "gate and up",
    "linear_fc2": "product",
    "decoder": "layer inputs",
}


class _Held:
    """One saved tensor; it ends with the graph that holds it."""

    def __init__(self, kept: Kept, tensor: Tensor, component: str) -> None:
        self.tensor = tensor
        self._kept, self._key = kept, kept.add(tensor, component)

    def __del__(self) -> None:
        self._kept.remove(self._key)


class Kept:
    """Bytes of the storages that graphs hold, without parameters; ``most``: by component, when they were most."""

    def __init__(self, gpts: Any) -> None:
        self._gpts = list(gpts)
        self._parameters = {p.untyped_storage().data_ptr() for gpt in self._gpts for p in (*gpt.parameters(),)}
        self._names: list[str] = []
        self._count = Counter[int]()  # graphs that hold a storage
        self._size: dict[int, tuple[str, int]] = {}
        self._now = Counter[str]()
        self.most = Counter[str]()

    def add(self, tensor: Tensor, component: str) -> int:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        self._count[key] += 1
        if self._count[key] == 1:
            self._size[key] = component, storage.nbytes()
            self._now[component] += storage.nbytes()
            if self._now.total() > self.most.total():
                self.most = self._now.copy()
        return key

    def remove(self, key: int) -> None:
        self._count[key] -= 1
        if not self._count[key]:
            component, size = self._size.pop(key)
            self._now[component] -= size

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = list(self._watch_modules())
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        for hook in hooks:
            hook.remove()

    def _watch_modules(self) -> Iterator[Any]:
        for gpt in self._gpts:
            for name, module in gpt.named_modules():
                yield module.register_forward_pre_hook(lambda *_, name=name: self._names.append(name))
                yield module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._names.pop()

    def _pack(self, tensor: Tensor) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1  # a part that is computed again
        if in_backward or tensor.untyped_storage().data_ptr() in self._parameters or not tensor.numel():
            return tensor
        return _Held(self, tensor, self._component(tensor))

    def _unpack(self, held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def _component(self, tensor: Tensor) -> str:
        for name in reversed(self._names):
            part = name.rpartition(".")[2]
            if part == "core_attention" and (not tensor.is_floating_point() or _is_angle(tensor)):
                return "positions"
            if part == "adapter" and tensor.shape[-1] < 16:
                return "adapters"
            if part in COMPONENTS:
                return COMPONENTS[part]
        return "head"


def _is_angle(tensor: Tensor) -> bool:
    return tensor.dim() == 3 and tensor.shape[1] == 1 and tensor.is_contiguous() and tensor._base is None


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that still exist; ``most``: the largest number so far."""

    def __init__(self) -> None:
        super().__init__()
        self._known = weakref.WeakSet[Any]()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _end(self, size: int) -> None:
        self.now -= size

    def _tensors(self, tree: Any) -> Iterator[Tensor]:
        return (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type != "meta")
