"""What runs inside vLLM's worker: taking new weights. Mixed into the worker class by vLLM's ``worker_extension_cls``.

Every device uses vLLM's layerwise reload. On a CPU nothing else works, because vLLM repacks linear weights after
loading and drops the originals. Elsewhere the reload repeats whatever a kernel did to its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlxf.core.errors import SyncError
from rlxf.sync.plan import Bucket

if TYPE_CHECKING:
    import numpy as np

_HEAD = "lm_head.weight"


class WeightLoader:
    """Begin, one call per bucket, end. Names start with ``rlxf_`` because they become methods of vLLM's own class."""

    model_runner: Any  # vLLM's
    vllm_config: Any
    device: torch.device
    rlxf_missing: set[str]  # vLLM names of the weights that this update has not brought yet
    rlxf_updating: bool

    @torch.no_grad()
    def rlxf_begin_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        with torch.device(self.device):
            if getattr(self, "rlxf_updating", False):  # the last update broke off: drop what its layers had collected
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.rlxf_missing = {name for name, _ in model.named_parameters()}  # a tied head is not in it
            self.rlxf_updating = True
            initialize_layerwise_reload(model)

    @torch.no_grad()
    def rlxf_load_bucket(self, bucket: Bucket, payload: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        views = bucket.views(torch.from_numpy(payload))
        # A layer's tensors are used up when its last one arrives. The embedding and the head wait for the end where
        # vLLM pads the vocabulary, so they must not be views of a payload that the sender may reuse.
        tensors = ((name, view if ".layers." in name else view.clone()) for name, view in views)
        with torch.device(self.device):
            self.rlxf_missing -= self.model_runner.model.load_weights(tensors)

    @torch.no_grad()
    def rlxf_end_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self.rlxf_missing:
            raise SyncError(
                f"an update ended, but {len(self.rlxf_missing)} weights did not arrive: {min(self.rlxf_missing)}, ..."
            )
        model = self.model_runner.model
        with torch.device(self.device):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
        self.rlxf_updating = False
        repack_tied_head(model)


def repack_tied_head(model: Any) -> None:
    """Rebuild what the output head derives from the embedding that it shares.

    Layerwise reload sees no weight arrive for a tied head and skips it; on a CPU the head then keeps its packed copy of
    the old matrix and uses it silently. It does no harm if the head has no copy. vLLM 0.23 to 0.32.
    """
    if _HEAD not in dict(model.named_parameters()) and hasattr(model, "lm_head"):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
