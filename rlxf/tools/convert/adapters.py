"""LoRA adapters of a checkpoint, and weights with an adapter merged into them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.models.hf_folder import ModelWeights
from rlxf.models.megatron.dist_folder import DistCheckpoint
from rlxf.models.megatron.weights import Entry, adapter_entries, linear_name, to_full, to_local
from rlxf.models.peft_folder import HEAD, PeftAdapter
from rlxf.tools.convert.layout import Shape
from rlxf.tools.convert.legacy import LegacyWeights, legacy_name

_FIRST = ".lora_A.weight"


def adapters_of_run(checkpoint: DistCheckpoint, shape: Shape, *, rank: int, alpha: float) -> PeftAdapter:
    """The adapters that a run with LoRA keeps in its checkpoints, by their Hugging Face names; with a reward head.

    Raises:
        ModelError: it holds none.
    """
    ranks = {name.removesuffix(_FIRST): checkpoint.shape(name)[0] for name in checkpoint if name.endswith(_FIRST)}
    if not ranks:
        raise ModelError(f"{checkpoint.folder}: holds no LoRA adapters; it was written by a run with lora_r = 0")
    found: dict[str, Tensor] = {}
    for entry in adapter_entries(shape.table, ranks):
        full = to_full(entry.kind, [checkpoint.read(entry.hf_names[0])], shape.geometry())
        found |= dict(zip(entry.hf_names, full, strict=True))
    if HEAD in checkpoint:  # it trains beside the adapters
        found[HEAD] = checkpoint.read(HEAD)
    return PeftAdapter(rank=rank, alpha=alpha, tensors=found)


def adapters_of_legacy(weights: LegacyWeights, shape: Shape, *, alpha: float | None) -> PeftAdapter:
    """The adapters beside the weights of a checkpoint in the older layout.

    Args:
        weights: of the checkpoint.
        shape: of the model.
        alpha: lora_alpha; None: that of the checkpoint.

    Raises:
        ModelError: it holds none, or their scale is unknown.
    """
    found: dict[str, Tensor] = {}
    for chunk in weights.chunks:
        linears = [entry for entry in chunk.entries if weights.holds(chunk, legacy_name(_first_of(entry)))]
        for entry in adapter_entries(linears, {linear_name(entry): 1 for entry in linears}):
            found |= dict(zip(entry.hf_names, weights.full(chunk, entry), strict=True))
    if not found:
        raise ModelError(f"{weights.folder}: holds no LoRA adapters (no parameter *.lora_A.default.weight)")
    rank = next(tensor.shape[0] for name, tensor in found.items() if name.endswith(_FIRST))
    alpha = alpha or getattr(weights.arguments, "lora_alpha", None)
    if alpha is None:
        raise ModelError(
            f"{weights.folder}: lora_alpha is not in the files; add --lora-alpha (and r = {rank} is in the files)"
        )
    return PeftAdapter(rank=rank, alpha=float(alpha), tensors=found)


def _first_of(entry: Entry) -> str:
    return f"{entry.parameter.removesuffix('.weight')}.adapter.lora_A"


class MergedWeights:
    """A model's weights with W + alpha / r B A in place of W, computed as the training backend does.

    Args:
        weights: of the base.
        adapter: for it.
        shape: of the base.
    """

    def __init__(self, weights: ModelWeights, adapter: PeftAdapter, shape: Shape) -> None:
        self._weights, self._adapter, self._geometry = weights, adapter, shape.geometry()
        linears = [entry for entry in shape.table if f"{linear_name(entry)}{_FIRST}" in adapter.tensors]
        linears = [entry for entry in linears if entry.parameter.endswith(".weight")]
        self._place = {name: (entry, index) for entry in linears for index, name in enumerate(entry.hf_names)}
        self._newest: tuple[Entry, list[Tensor]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> set[str]:
        return self._weights.names() | {HEAD}.intersection(self._adapter.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._adapter.tensors[name].shape) if self._is_head(name) else self._weights.shape(name)

    def read(self, name: str) -> Tensor:
        if self._is_head(name):
            return self._adapter.tensors[name]
        if name not in self._place:
            return self._weights.read(name)
        entry, index = self._place[name]
        if self._newest is None or self._newest[0] is not entry:
            self._newest = (entry, self._merge(entry))
        return self._newest[1][index].contiguous()

    def _is_head(self, name: str) -> bool:
        return name == HEAD and HEAD in self._adapter.tensors

    def _merge(self, entry: Entry) -> list[Tensor]:
        tensors: Mapping[str, Tensor] = self._adapter.tensors
        seconds = [tensors[f"{name.removesuffix('.weight')}.lora_B.weight"] for name in entry.hf_names]
        packed = self._pack(entry, [self._weights.read(name) for name in entry.hf_names])
        first, second = tensors[f"{linear_name(entry)}{_FIRST}"], self._pack(entry, seconds)
        scale = self._adapter.alpha / self._adapter.rank
        # Stays in fp32 until the writer rounds it once, to the requested dtype or to that of the base.
        merged = packed.float() + scale * (second.float() @ first.float())
        return to_full(entry.kind, [merged], self._geometry)

    def _pack(self, entry: Entry, tensors: list[Tensor]) -> Tensor:
        return to_local(entry.kind, tensors, self._geometry, tp_rank=0, tp_size=1)
