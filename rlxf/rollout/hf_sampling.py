"""Sampling from a Hugging Face causal LM, as a loop of our own around its forward pass.

``generate`` computes a prompt once per sample, pads prompts, copies the cache for every token and goes on with rows
that have ended. Here equal prompts are computed once, end to end; the cache is allocated once; a row leaves the batch
with its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlxf.platform.base import Platform
from rlxf.rollout.engine import Completion, Sampling

ATTENTION = "rlxf_grouped"  # the name under which ``transformers`` finds ``grouped_attention``
PREFILL_TOKENS = 8192  # prompt tokens of one forward pass


def register_attention(platform: Platform) -> str:
    """Make ``attn_implementation=ATTENTION`` known to ``transformers``; the name."""
    AttentionInterface.register(ATTENTION, partial(grouped_attention, platform))
    return ATTENTION


def grouped_attention(
    platform: Platform,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of whole prompts laid end to end, or of one new token per row.

    Args:
        query: [1, heads, T, d] with ``cu_seq_lens_q``, else [B, heads, 1, d].
        key: [1, kv_heads, T, d] or [B, kv_heads, columns, d]; ``value`` likewise.
        attention_mask: [B, 1, 1, columns] bool, true where a row may look; None: everywhere.
        cu_seq_lens_q: [P + 1] int32 bounds of the prompts.

    Returns:
        [1 or B, T or 1, heads, d], in the form that ``transformers`` expects.
    """
    if cu_seq_lens_q is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return platform.packed_attention(q, k, v, cu_seq_lens_q, cu_seq_lens_q, scaling).unsqueeze(0), None
    # The query heads of a group read the same keys: as rows of one query they need no copy of them.
    grouped = query.view(len(query), key.size(1), -1, query.size(-1))  # [B, kv_heads, heads / kv_heads, d]
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(query), 1, -1, query.size(-1)), None


class KeyValueCache(Cache):  # type: ignore[misc]
    """Keys and values of rows whose prompts all end in the same column; allocated once, written in place.

    Args:
        num_rows: rows at the beginning.
        num_columns: longest prompt plus completion, tokens.
        prompt_columns: longest prompt, tokens.
    """

    def __init__(self, num_rows: int, num_columns: int, prompt_columns: int) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.num_columns = num_columns
        self.used = prompt_columns  # columns that are filled
        self._states: list[tuple[Tensor, Tensor]] = []  # of each layer, [rows, kv_heads, columns, d]
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    def fill(self, rows: Tensor, columns: Tensor, sources: Tensor) -> None:
        """The next forward pass computes prompts: its token ``sources[i]`` belongs to ``rows[i], columns[i]``."""
        self._places = (rows, columns, sources)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """What ``transformers`` calls in each layer: takes the new states, gives those that attention reads."""
        new = (key_states, value_states)
        if layer_idx == len(self._states):
            self._states.append((self._allocate(key_states), self._allocate(value_states)))
        if self._places is not None:
            rows, columns, sources = self._places
            for states, added in zip(self._states[layer_idx], new, strict=True):
                states[rows, :, columns] = added[0].transpose(0, 1)[sources]
            return new
        for states, added in zip(self._states[layer_idx], new, strict=True):
            states[: self.num_rows, :, self.used] = added[:, :, 0]
        return tuple(states[: self.num_rows, :, : self.used + 1] for states in self._states[layer_idx])

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because a masked column still counts as 0 times its content, which must not be NaN.
        return like.new_zeros(self.num_rows, like.size(1), self.num_columns, like.size(-1))

    def start_decoding(self) -> None:
        self._places = None

    def advance(self) -> None:
        """A forward pass of one token per row is over: its column counts as filled."""
        self.used += 1

    def drop(self, ended: Tensor) -> Tensor:
        """Remove the rows where ``ended`` ([rows] bool); the old index of each row that is left, in the new order."""
        alive = int((~ended).sum())
        order = torch.arange(alive, device=ended.device)
        holes = ended[:alive].nonzero()[:, 0]
        movers = (~ended[alive:]).nonzero()[:, 0] + alive  # rows from the end take the free places: few copies
        order[holes] = movers
        if holes.numel():
            for layer in self._states:
                for states in layer:
                    states[holes, :, : self.used] = states[movers, :, : self.used]
        self.num_rows = alive
        return order

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used


class Sampler:
    """Decides the next token of each row: argmax(logits / temperature + Gumbel noise).

    The noise of a row comes from that row's own generator, so its completion does not depend on the rest of the batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._warpers = warpers(sampling)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []

    def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        """[n] int64 tokens of ``rows``, from their [n, V] float32 logits."""
        scores = logits
        for warper in self._warpers:
            scores = warper(None, scores)
        if self._generators:
            noise = torch.empty(scores.shape)
            for place, row in zip(noise, rows, strict=True):
                place.exponential_(generator=self._generators[row])
            scores = scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_().to(scores.device)
        return scores.argmax(dim=-1)


def warpers(sampling: Sampling) -> list[Any]:
    """What changes the logits before a token is drawn, in the order of ``transformers``."""
    if sampling.temperature == 0:
        return []
    found: list[Any] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


@torch.inference_mode()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    device: torch.device,
) -> list[Completion]:
    """A completion of each prompt, up to its first EOS or ``max_new_tokens``; equal prompts are computed once.

    ``model`` must have been loaded with ``attn_implementation=ATTENTION``.
    """
    distinct = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, prompts)))}
    source = torch.tensor([distinct[tuple(row)] for row in prompts], device=device)  # [B] distinct prompt of each row
    lengths = torch.tensor([len(row) for row in prompts], device=device)  # [B]
    width = int(lengths.max())
    cache = KeyValueCache(len(prompts), width + max_new_tokens, width)
    logits = _prefill(model, list(distinct), source, cache, device)[source]  # [B, V] float32
    columns = torch.arange(cache.num_columns, device=device)
    mask = (columns >= (width - lengths)[:, None])[:, None, None]  # [B, 1, 1, columns], prompts end in one column
    rows, positions = torch.arange(len(prompts), device=device), lengths
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    logps = torch.zeros(len(prompts), max_new_tokens, device=device)
    counts = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    for index in range(max_new_tokens):
        chosen = sampler.choose(logits, rows.tolist())  # [n]
        tokens[rows, index] = chosen
        logps[rows, index] = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        counts[rows] = index + 1
        ended = torch.isin(chosen, eos)
        if bool(ended.any()):
            order = cache.drop(ended)
            rows, positions, mask, chosen = rows[order], positions[order], mask[order], chosen[order]
        if index + 1 == max_new_tokens or not len(rows):
            break
        logits = _decode(model, chosen, positions, mask, cache)
        positions = positions + 1
    sampled = zip(tokens.tolist(), logps.tolist(), counts.tolist(), strict=True)
    return [Completion(tokens=row[:count], logps=row_logps[:count]) for row, row_logps, count in sampled]


def _decode(model: Any, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueCache) -> Tensor:
    """[n, V] float32 logits after one more token of each row."""
    output = model(
        input_ids=tokens[:, None],
        position_ids=positions[:, None],
        attention_mask=mask[..., : cache.used + 1],
        past_key_values=cache,
        use_cache=True,
    )
    cache.advance()
    logits: Tensor = output.logits[:, -1].float()
    return logits


def _prefill(
    model: Any, prompts: list[tuple[int, ...]], source: Tensor, cache: KeyValueCache, device: torch.device
) -> Tensor:
    """[P, V] float32 logits after each prompt; their keys and values go into every row of the cache that has them."""
    logits = []
    for first, part in _parts(prompts):
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # [P + 1]
        rows = ((source >= first) & (source < first + len(part))).nonzero()[:, 0]
        mine = source[rows] - first  # [rows] prompt of this part
        of_row = torch.arange(len(rows), device=device).repeat_interleave(lengths[mine])  # an entry per token and row
        inside = torch.arange(len(of_row), device=device) - (lengths[mine].cumsum(0) - lengths[mine])[of_row]
        cache.fill(rows[of_row], (cache.used - lengths[mine])[of_row] + inside, bounds[mine][of_row] + inside)
        total = int(bounds[-1])
        positions = torch.arange(total, device=device) - bounds[:-1].repeat_interleave(lengths)
        output = model(
            input_ids=torch.tensor([[token for prompt in part for token in prompt]], device=device),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=bounds[1:] - 1,
            cu_seq_lens_q=bounds.int(),
        )
        logits.append(output.logits[0].float())
    cache.start_decoding()
    return torch.cat(logits)


def _parts(prompts: list[tuple[int, ...]]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Index of the first prompt and the prompts of each forward pass: as many as ``PREFILL_TOKENS`` allows."""
    first, part, total = 0, list[tuple[int, ...]](), 0
    for number, prompt in enumerate(prompts):
        if part and total + len(prompt) > PREFILL_TOKENS:
            yield first, part
            first, part, total = number, [], 0
        part.append(prompt)
        total += len(prompt)
    yield first, part
