"""A model that follows another one in small steps. Steps that are too small for bf16 are not lost."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor

from rlxf.models.megatron.model import MegatronModel, Piece
from rlxf.models.megatron.weights import to_local


class MovingWeights:
    """One rank's share of the weights that are moved.

    A parameter that is not fp32 has an fp32 copy. The copy moves, and the parameter is the copy, rounded. This takes 4
    bytes per parameter on the model's device.
    """

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self._parameters: list[dict[str, Tensor]] = [dict(gpt.named_parameters()) for gpt in model.chunks]
        self._exact = [  # of each chunk, by the parameters' names
            {name: value.data.float() for name, value in held.items() if value.dtype != torch.float32}
            for held in self._parameters
        ]

    @torch.no_grad()
    def blend(self, names: Container[str], read: Callable[[str], Tensor], alpha: float) -> None:
        """Move parameters to ``alpha`` times the tensors given, plus ``1 - alpha`` times what they are.

        One parameter's tensors are read at a time. A parameter that holds several tensors (query, key and value) moves
        only if all of them are given.

        Args:
            names: Hugging Face names of the tensors given.
            read: the full tensor of a name.
            alpha: 1 takes the tensors over.
        """
        model, layout = self._model, self._model.layout
        for chunk, (parameters, copies) in enumerate(zip(self._parameters, self._exact, strict=True)):
            for entry in model.entries_of(chunk):
                if not all(name in names for name in entry.hf_names):
                    continue
                full = [read(name) for name in entry.hf_names]
                local = to_local(entry.kind, full, model.geometry, tp_rank=layout.tp_rank, tp_size=layout.tp_size)
                own = parameters[entry.parameter].data
                exact = copies.get(entry.parameter, own)
                if alpha < 1:
                    exact.lerp_(local.to(exact), alpha)
                else:
                    exact.copy_(local)
                if own is not exact:
                    own.copy_(exact)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Every full tensor in fp32 on rank 0, as ``MegatronModel.export`` gives the rounded ones."""
        return self._model.export_all(self._local)

    def _local(self, piece: Piece) -> Tensor:
        name = piece.entry.parameter
        return self._exact[piece.chunk].get(name, self._parameters[piece.chunk][name])
