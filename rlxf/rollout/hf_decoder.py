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

Linears = tuple[torch.nn.Linear, ...]  # layers that read the same input


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
        self._few: dict[Linears, Callable[[Tensor], Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights again for ``few_rows``; call it when they have changed."""
        self.drop_copies()  # first, so that the new ones can have their memory
        groups = [
            group for layer in self._body.layers for group in (_qkv(layer), _out(layer), _gate_up(layer), _down(layer))
        ]
        for group in (*groups, (self._head,)):
            self._few[group] = self._linear.frozen(*((module.weight, module.bias) for module in group))

    def drop_copies(self) -> None:
        """Free the copies of the weights; ``few_rows`` works again after ``refresh``."""
        self._few.clear()

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attention, *, few_rows: bool = False) -> Tensor:
        """[T, H] after the final norm, of ``tokens`` [T] at ``positions`` [T].

        ``few_rows``: with the copies of the weights that are laid out for few rows.
        """
        x = self._body.embed_tokens(tokens)
        cos, sin = (angles.transpose(0, 1) for angles in self._body.rotary_emb(x, positions[None]))  # [T, 1, d]
        half = self.head_size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # the sign of "rotate half", once for all layers
        for number, layer in enumerate(self._body.layers):
            qkv = self._apply(_qkv(layer), _norm(layer.input_layernorm, x), few_rows).view(len(x), -1, self.head_size)
            both, value = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]  # queries and keys, [T, heads, d]
            if hasattr(layer.self_attn, "q_norm"):
                both = _head_norms(layer.self_attn, both, self.kv_heads)
            both = both * cos + both.roll(half, dims=-1) * sin
            query, key = both[:, : -self.kv_heads], both[:, -self.kv_heads :]
            out = attend(number, query, key, value, layer.self_attn.scaling)
            x = x + self._apply(_out(layer), out.flatten(1), few_rows)
            h = self._apply(_gate_up(layer), _norm(layer.post_attention_layernorm, x), few_rows)
            gate, up = h.chunk(2, dim=-1)
            x = x + self._apply(_down(layer), F.silu(gate) * up, few_rows)
        return _norm(self._body.norm, x)

    def logits(self, hidden: Tensor, *, few_rows: bool = False) -> Tensor:
        """[T, V] float32."""
        return self._apply((self._head,), hidden, few_rows).float()

    def next_logits(self, tokens: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """[n, V] float32 after one token of each of a few rows."""
        return self.logits(self.hidden_states(tokens, positions, attend, few_rows=True), few_rows=True)

    def _apply(self, modules: Linears, x: Tensor, few_rows: bool) -> Tensor:
        """[T, sum of N] outputs of layers with the same input, side by side."""
        if few_rows:
            return self._few[modules](x)
        return torch.cat([self._linear.output(x, module.weight, module.bias) for module in modules], dim=-1)


def _qkv(layer: Any) -> Linears:
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def _out(layer: Any) -> Linears:
    return (layer.self_attn.o_proj,)


def _gate_up(layer: Any) -> Linears:
    return layer.mlp.gate_proj, layer.mlp.up_proj


def _down(layer: Any) -> Linears:
    return (layer.mlp.down_proj,)


def _head_norms(module: Any, both: Tensor, kv_heads: int) -> Tensor:
    query, key = both[:, :-kv_heads], both[:, -kv_heads:]
    return torch.cat([_norm(module.q_norm, query), _norm(module.k_norm, key)], dim=1)


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.size(-1),), module.weight, module.variance_epsilon)
    weight: Tensor = module.weight
    return weight * F.rms_norm(x.float(), (x.size(-1),), None, module.variance_epsilon).to(x.dtype)
