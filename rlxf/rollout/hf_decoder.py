"""The forward pass of a Hugging Face Llama, Qwen2 or Qwen3 for sampling: flat rows of tokens, and few operations.

The modules of ``transformers`` stay where the weights, their names and the rotary frequencies are; calling them costs a
small model more time per token than its arithmetic does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.platform.linear import Linear


class Attention(Protocol):
    """[T, heads, d] from layer number, [T, heads, d] query, [T, kv_heads, d] key and value, and the scores' scale."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, /) -> Tensor: ...


class Decoder:
    """Hidden states and logits of one causal LM.

    Args:
        model: a ``*ForCausalLM`` of a family in ``rlxf/models/megatron/families.py``.
        linear: the platform's.
    """

    def __init__(self, model: Any, linear: Linear) -> None:
        self._body, self._head, self._linear = model.model, model.lm_head, linear
        attention = self._body.layers[0].self_attn
        self.num_layers = len(self._body.layers)
        self.head_size: int = attention.head_dim
        self.kv_heads: int = attention.k_proj.out_features // self.head_size
        self.dtype: torch.dtype = attention.k_proj.weight.dtype
        self._few: dict[Any, Callable[[Tensor], Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take note that the weights have changed."""
        modules = [module for module in self._body.modules() if isinstance(module, torch.nn.Linear)]
        self._few.clear()  # first, so that the new copies can have the old ones' memory
        self._few = {module: self._linear.frozen(module.weight, module.bias) for module in (*modules, self._head)}

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attention, *, few_rows: bool = False) -> Tensor:
        """[T, H] after the final norm, of ``tokens`` [T] at ``positions`` [T].

        ``few_rows``: through the copies of the weights that are made for it.
        """
        x = self._body.embed_tokens(tokens)
        cos, sin = (angles.transpose(0, 1) for angles in self._body.rotary_emb(x, positions[None]))  # [T, 1, d]
        half = self.head_size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # the sign of "rotate half", once for all layers
        for number, layer in enumerate(self._body.layers):
            h = _norm(layer.input_layernorm, x)
            x = x + self._attention(number, layer.self_attn, h, (cos, sin), attend, few_rows)
            h = _norm(layer.post_attention_layernorm, x)
            mlp = layer.mlp
            gate, up = (self._apply(module, h, few_rows) for module in (mlp.gate_proj, mlp.up_proj))
            x = x + self._apply(mlp.down_proj, F.silu(gate) * up, few_rows)
        return _norm(self._body.norm, x)

    def _attention(
        self, number: int, module: Any, h: Tensor, angles: tuple[Tensor, Tensor], attend: Attention, few_rows: bool
    ) -> Tensor:
        query, key, value = (
            self._apply(projection, h, few_rows).view(len(h), -1, self.head_size)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = _norm(module.q_norm, query), _norm(module.k_norm, key)
        both = torch.cat([query, key], dim=1)
        both = both * angles[0] + both.roll(self.head_size // 2, dims=-1) * angles[1]
        out = attend(number, both[:, : query.size(1)], both[:, query.size(1) :], value, module.scaling)
        return self._apply(module.o_proj, out.flatten(1), few_rows)

    def logits(self, hidden: Tensor, *, few_rows: bool = False) -> Tensor:
        """[T, V] float32."""
        return self._apply(self._head, hidden, few_rows).float()

    def next_logits(self, tokens: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """[n, V] float32 after one token of each of a few rows."""
        return self.logits(self.hidden_states(tokens, positions, attend, few_rows=True), few_rows=True)

    def _apply(self, module: torch.nn.Linear, x: Tensor, few_rows: bool) -> Tensor:
        return self._few[module](x) if few_rows else self._linear.output(x, module.weight, module.bias)


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.size(-1),), module.weight, module.variance_epsilon)
    weight: Tensor = module.weight
    return weight * F.rms_norm(x.float(), (x.size(-1),), None, module.variance_epsilon).to(x.dtype)
