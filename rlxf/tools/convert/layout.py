"""Where the parameters of a model are in a parallel layout, and whether a model can be cut that way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlxf.core.errors import ConfigError
from rlxf.models.megatron.families import Family, family_of
from rlxf.models.megatron.weights import Entry, Geometry, entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Ranks along the parallel axes of a checkpoint."""

    tp: int = 1
    pp: int = 1
    vp: int = 1  # pieces of layers per pipeline rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What kind of model it is: enough to name every parameter and to cut it."""

    num_layers: int
    family: Family
    tied: bool
    reward: bool
    hf_config: Any

    @classmethod
    def of(cls, hf_config: Any, *, reward: bool, folder: str) -> Shape:
        """That of a ``transformers`` config. Raises ``ModelError`` for an architecture that is not known."""
        return cls(
            num_layers=hf_config.num_hidden_layers,
            family=family_of(hf_config, folder),
            tied=bool(hf_config.tie_word_embeddings) and not reward,
            reward=reward,
            hf_config=hf_config,
        )

    def geometry(self, tp_size: int = 1) -> Geometry:
        return Geometry.of(self.hf_config, tp_size=tp_size)

    @property
    def table(self) -> list[Entry]:
        """Every parameter of the whole model, under the names of one that is not cut."""
        layers = range(self.num_layers)
        return list(entries(layers, self.family, first=True, last=True, tied=self.tied, reward=self.reward))

    @property
    def hf_names(self) -> list[str]:
        return [name for entry in self.table for name in entry.hf_names]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The parameters that one pipeline rank computes as one."""

    stage: int
    index: int  # which of the rank's chunks
    entries: tuple[Entry, ...]


def cut(shape: Shape, layers: Sequence[Sequence[int]]) -> Iterator[Chunk]:
    """The chunks of a model, in the order in which it computes.

    Args:
        shape: the model.
        layers: number of layers in each pipeline rank's chunks, rank by rank.
    """
    places = [(stage, index) for index in range(len(layers[0])) for stage in range(len(layers))]
    start = 0
    for place in places:
        stage, index = place
        own = range(start, start + layers[stage][index])
        start = own.stop
        ends = {"first": place == places[0], "last": place == places[-1]}
        table = entries(own, shape.family, **ends, tied=shape.tied, reward=shape.reward)
        yield Chunk(stage=stage, index=index, entries=tuple(table))


def even_layers(shape: Shape, sizes: Sizes) -> list[list[int]]:
    """As many layers in every chunk."""
    return [[shape.num_layers // (sizes.pp * sizes.vp)] * sizes.vp for _ in range(sizes.pp)]


def target_sizes(shape: Shape, *, tp: int, pp: int, layers_per_chunk: int | None) -> Sizes:
    """The sizes that a command asks for.

    Raises:
        ConfigError: the model cannot be cut so; one line per reason.
    """
    config, problems = shape.hf_config, list[str]()
    geometry = shape.geometry()
    flag = f"--target-tensor-parallel-size {tp}"
    shares = {"attention heads": geometry.heads, "feed-forward width": config.intermediate_size}
    undivided = [f"{number} {what}" for what, number in shares.items() if tp < 1 or number % tp]
    if undivided:
        problems.append(f"{flag}: the model has {undivided[0]}, which it must divide")
    elif geometry.kv_heads % tp and tp % geometry.kv_heads:  # more ranks than such heads: neighbours share one
        problems.append(f"{flag}: must be a divisor or a multiple of the model's {geometry.kv_heads} key/value heads")
    if pp < 1 or shape.num_layers % pp:
        problems.append(f"--target-pipeline-parallel-size {pp}: must divide the model's {shape.num_layers} layers")
    if problems or layers_per_chunk is None:
        if problems:
            raise ConfigError(*problems)
        return Sizes(tp=tp, pp=pp)
    per_rank = shape.num_layers // pp
    flag = f"--num-layers-per-virtual-pipeline-stage {layers_per_chunk}"
    if layers_per_chunk < 1 or per_rank % layers_per_chunk:
        raise ConfigError(f"{flag}: must divide the {per_rank} layers of each of {pp} pipeline ranks")
    if pp == 1 and per_rank != layers_per_chunk:
        raise ConfigError(f"{flag}: virtual pipeline stages need --target-pipeline-parallel-size of 2 or more")
    return Sizes(tp=tp, pp=pp, vp=per_rank // layers_per_chunk)
