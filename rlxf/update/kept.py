"""A copy of the weights that were pushed last, for as long as the actor's own are newer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rlxf.core.types import Metrics
from rlxf.platform.links import Copies

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel, Piece


class KeptWeights:
    """This rank's share of them, in host memory.

    A run that looks ahead samples from the pushed weights while the actor trains: an engine that is started again needs
    them, and so does a checkpoint. The copy is made beside the forward and backward pass of the update's first
    mini-batch; before that update the model itself is the copy.
    """

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self._host: dict[tuple[str, ...], Tensor] = {}  # by the names of a parameter
        self._copies: Copies | None = None  # of the newest push

    def pushed(self) -> None:
        """The model's weights are being pushed: the copy of the earlier ones is of no use any more."""
        self._copies = None

    def before_update(self) -> None:
        """Begin to copy, unless these weights are copied already."""
        if self._copies is not None or not self._model.layout.is_first_replica:
            return
        links, pieces = self._model.platform.links, list(self._model.local_pieces())
        shares = [self._model.local_weight(piece).detach() for piece in pieces]
        if not self._host:
            self._host = {
                piece.entry.hf_names: links.host_copy(share) for piece, share in zip(pieces, shares, strict=True)
            }
        self._copies = links.copy_beside(shares, [self._host[piece.entry.hf_names] for piece in pieces])

    def before_step(self) -> None:
        """Before weights change."""
        if self._copies is not None:
            self._copies.before_changes()

    def metrics(self) -> Metrics:
        """``sync/copy_s``: how long the copies took, beside the update."""
        if self._copies is None:
            return {}
        self._copies.wait()
        return {"sync/copy_s": self._copies.seconds}

    def export(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """As ``MegatronModel.export``, of the weights that were pushed last."""
        if self._copies is None:
            return self._model.export(names)
        self._copies.wait()
        return self._model.export(names, self._share)

    def _share(self, piece: Piece) -> Tensor:
        return self._host[piece.entry.hf_names].to(self._model.layout.device)
