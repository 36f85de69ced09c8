"""What runs inside vLLM's worker: taking new weights. Mixed into the worker class by vLLM's ``worker_extension_cls``.

Every device uses vLLM's layerwise reload. On a CPU nothing else works, because vLLM repacks linear weights after
loading and drops the originals. Elsewhere the reload repeats whatever a kernel did to its weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.platform.base import Platform
from rlxf.platform.visible import visible_device
from rlxf.rollout.noise import install
from rlxf.sync.checksums import Checksums, checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace, Transport

if TYPE_CHECKING:
    import numpy as np

_HEAD = "lm_head.weight"


class WeightLoader:
    """Begin, one call per bucket, end. Names start with ``rlxf_`` because they become methods of vLLM's own class."""

    model_runner: Any  # vLLM's
    vllm_config: Any
    device: torch.device
    rank: int  # of the engine's processes
    local_rank: int  # the number of its device in this process
    rlxf_receiver: Receiver
    rlxf_missing: set[str]  # vLLM names of the weights that this update has not brought yet
    rlxf_updating: bool

    def rlxf_open_receiver(
        self, transport: Transport, address: Address, first: int, host: str, platform: Platform
    ) -> None:
        """Connect this process with the actor. ``first``: the number of the engine's rank 0 among all receivers."""
        earlier: Receiver | None = getattr(self, "rlxf_receiver", None)
        if earlier is not None:
            earlier.close()
        place = ReceiverPlace(
            number=first + self.rank,
            platform=platform,
            device=self.device,
            # vLLM may number the devices of its processes anew.
            where=visible_device(platform, self.local_rank if self.device.index is None else self.device.index),
            host=host,
        )
        self.rlxf_receiver = transport.receiver(address, place)

    def rlxf_draw_all_rows_at_once(self, sampler: str) -> None:
        """``sampler``: ``Platform.vllm_sampler``."""
        install(importlib.import_module(sampler))

    @torch.no_grad()
    def rlxf_begin_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        with self.rlxf_as_when_loading():
            if getattr(self, "rlxf_updating", False):  # the last update broke off: drop what its layers had collected
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.rlxf_missing = {name for name, _ in model.named_parameters()}  # a tied head is not in it
            self.rlxf_updating = True
            initialize_layerwise_reload(model)

    def rlxf_receive(self, bucket: Bucket, message: Message, check: bool) -> Checksums | None:
        """Load a bucket as the transport brings it; its checksums, if asked for."""
        payload = self.rlxf_receiver.receive(bucket, message)
        self.rlxf_load(bucket, payload)
        if self.device.type != "cpu":  # the sender may use the memory again when this returns
            torch.get_device_module(self.device).synchronize()
        return checksums(bucket, payload) if check else None

    def rlxf_load_bucket(self, bucket: Bucket, payload: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Load a bucket from an array of its bytes."""
        self.rlxf_load(bucket, torch.from_numpy(payload))

    @torch.no_grad()
    def rlxf_load(self, bucket: Bucket, payload: Tensor) -> None:
        # A layer's tensors are used up when its last one arrives. The embedding and the head wait for the end where
        # vLLM pads the vocabulary, so they must not be views of a payload that the sender may reuse.
        views = bucket.views(payload)
        tensors = ((name, view if ".layers." in name else view.clone()) for name, view in views)
        with self.rlxf_as_when_loading():
            self.rlxf_missing -= self.model_runner.model.load_weights(tensors)

    @torch.no_grad()
    def rlxf_end_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self.rlxf_missing:
            raise SyncError(
                f"an update ended, but {len(self.rlxf_missing)} weights did not arrive: {min(self.rlxf_missing)}, ..."
            )
        model = self.model_runner.model
        with self.rlxf_as_when_loading():
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.rlxf_updating = False
            repack_tied_head(model)

    @contextmanager
    def rlxf_as_when_loading(self) -> Iterator[None]:
        """The device and the settings that layers expect while vLLM loads a model: some ask for them."""
        from vllm.config import set_current_vllm_config

        with torch.device(self.device), set_current_vllm_config(self.vllm_config):
            yield


def repack_tied_head(model: Any) -> None:
    """Rebuild what the output head derives from the embedding that it shares.

    Layerwise reload sees no weight arrive for a tied head and skips it; on a CPU the head then keeps its packed copy of
    the old matrix and uses it silently. It does no harm if the head has no copy. vLLM 0.23 to 0.32.
    """
    if _HEAD not in dict(model.named_parameters()) and hasattr(model, "lm_head"):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
