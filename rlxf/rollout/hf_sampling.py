"""Sampling from a Hugging Face causal LM by a loop of our own.

``generate`` computes a prompt once per sample, pads prompts, copies the cache for every token and keeps computing rows
that have ended. Here equal prompts are computed once, end to end; the cache is allocated once; a row leaves the batch
with its last token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlxf.core.progress import progress
from rlxf.models.stop_strings import StopStrings
from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.base import Platform
from rlxf.rollout.engine import Completion, Sampling
from rlxf.rollout.hf_decoder import Decoder

PREFILL_TOKENS = 8192  # prompt tokens of one forward pass


class KeyValueCache:
    """Keys and values of rows whose prompts all end in the same column; allocated once, written in place.

    Args:
        lengths: [B] int64 tokens of each row's prompt.
        max_new_tokens: room for as many more.
        decoder: of which number, size and type of the states are taken.
    """

    def __init__(self, lengths: Tensor, max_new_tokens: int, decoder: Decoder) -> None:
        self.num_rows = len(lengths)
        self.used = int(lengths.max())  # columns that are filled: the longest prompt, then a column per token
        columns = torch.arange(self.used + max_new_tokens, device=lengths.device)
        shape = (self.num_rows, decoder.kv_heads, len(columns), decoder.head_size)
        # Zeros, because a masked column still counts as 0 times its content, which must not be NaN.
        self._states = [
            tuple(torch.zeros(shape, dtype=decoder.dtype, device=lengths.device) for _ in range(2))
            for _ in range(decoder.num_layers)
        ]
        self._mask = (columns >= (self.used - lengths)[:, None])[:, None, None]  # [B, 1, 1, columns]: a row's own

    def put_prompts(self, layer: int, rows: Tensor, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """``key[i]`` and ``value[i]`` ([kv_heads, d]) belong to ``rows[i], columns[i]``."""
        for states, new in zip(self._states[layer], (key, value), strict=True):
            states[rows, :, columns] = new

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[n, heads, d] attention of one new token per row; its own ``key`` and ``value`` go into the cache."""
        rows, end = self.num_rows, self.used + 1
        keys, values = self._states[layer]
        keys[:rows, :, self.used] = key
        values[:rows, :, self.used] = value
        # The query heads of a group read the same keys: as rows of one query they need no copy of them.
        grouped = query.view(rows, key.size(1), -1, query.size(-1))  # [n, kv_heads, heads / kv_heads, d]
        mask = self._mask[:rows, ..., :end]
        out = F.scaled_dot_product_attention(grouped, keys[:rows, :, :end], values[:rows, :, :end], mask, scale=scale)
        return out.reshape(query.shape)

    def advance(self) -> None:
        """All layers have their states of one more token per row."""
        self.used += 1

    def drop(self, ended: Tensor) -> Tensor:
        """Remove the rows where ``ended`` ([n] bool); the old index of each row that is left, in the new order."""
        alive = int((~ended).sum())
        order = torch.arange(alive, device=ended.device)
        holes = ended[:alive].nonzero()[:, 0]
        movers = (~ended[alive:]).nonzero()[:, 0] + alive  # rows from the end take the free places: few copies
        order[holes] = movers
        if holes.numel():
            for states in (states for layer in self._states for states in layer):
                states[holes, :, : self.used] = states[movers, :, : self.used]
        self._mask = self._mask[order]
        self.num_rows = alive
        return order


class Sampler:
    """Decides the next token of each row: argmax(logits / temperature + Gumbel noise).

    The noise of a row comes from that row's own generator, so its completion does not depend on the rest of the batch.

    Args:
        seeds: of each row.
        sampling: what changes the logits before a token is drawn.
        prompts: of each row; a repetition penalty counts their tokens.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, prompts: Sequence[Sequence[int]] = ()) -> None:
        self._warpers = warpers(sampling)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []
        self._seen = _padded(prompts) if sampling.repetition_penalty != 1 else None

    def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        """[n] int64 tokens of ``rows``, from their [n, V] float32 logits."""
        chosen = self._choose(logits, rows)
        if self._seen is not None:  # a row that is not asked about any more has ended
            column = self._seen[:, :1].clone()
            column[rows] = chosen[:, None].cpu()
            self._seen = torch.cat([self._seen, column], dim=1)
        return chosen

    def _choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        scores = logits
        seen = None if self._seen is None else self._seen[rows].to(logits.device)
        for warper in self._warpers:
            scores = warper(seen, scores)
        if self._generators:
            noise = torch.empty(scores.shape)
            for place, row in zip(noise, rows, strict=True):
                place.exponential_(generator=self._generators[row])
            scores = scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_().to(scores.device)
        return scores.argmax(dim=-1)


def warpers(sampling: Sampling) -> list[Any]:
    """What changes the logits before a token is drawn, in the order of ``transformers``."""
    found: list[Any] = []
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(float(sampling.min_p)))
    return found


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, longest] int64: rows of tokens, filled up with their own first token, which counts once however often."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])


@torch.inference_mode()
def sample_completions(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    stops: StopStrings,
    platform: Platform,
    device: torch.device,
) -> Generator[list[tuple[int, Completion]], None, None]:
    """A completion of each prompt, up to its first EOS, the end of its first stop string or ``max_new_tokens``.

    Equal prompts are computed once. Each time that rows end, their numbers and completions come out, in the order of
    the rows.
    """
    distinct = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, prompts)))}
    source = torch.tensor([distinct[tuple(row)] for row in prompts], device=device)  # [B] distinct prompt of each row
    positions = torch.tensor([len(row) for row in prompts], device=device)  # [B] of the next token
    cache = KeyValueCache(positions, max_new_tokens, decoder)
    logits = _prefill(decoder, list(distinct), source, cache, platform)[source]  # [B, V] float32
    rows = torch.arange(len(prompts), device=device)
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    logps = torch.zeros(len(prompts), max_new_tokens, device=device)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    readers = [stops.reader() for _ in prompts] if stops else []
    for index in range(max_new_tokens):
        progress.tick()
        chosen = sampler.choose(logits, rows.tolist())  # [n]
        tokens[rows, index] = chosen
        logps[rows, index] = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        ended = torch.isin(chosen, eos)
        if readers:
            pairs = zip(rows.tolist(), chosen.tolist(), strict=True)
            ended |= torch.tensor([readers[row].add(token) for row, token in pairs], device=device)
        if index + 1 == max_new_tokens:
            ended = torch.ones_like(ended)
        if bool(ended.any()):
            yield _completions(rows[ended], index + 1, tokens, logps)
            order = cache.drop(ended)
            rows, positions, chosen = rows[order], positions[order], chosen[order]
        if not len(rows):
            return
        logits = decoder.next_logits(chosen, positions, cache.attend)
        cache.advance()
        positions = positions + 1


def _completions(rows: Tensor, count: int, tokens: Tensor, logps: Tensor) -> list[tuple[int, Completion]]:
    """Number and completion of each of ``rows``: ``count`` tokens."""
    rows = rows.sort().values
    sampled = zip(rows.tolist(), tokens[rows, :count].tolist(), logps[rows, :count].tolist(), strict=True)
    return [(row, Completion(tokens=found, logps=found_logps)) for row, found, found_logps in sampled]


def _prefill(
    decoder: Decoder, prompts: list[tuple[int, ...]], source: Tensor, cache: KeyValueCache, platform: Platform
) -> Tensor:
    """[P, V] float32 logits after each prompt; their keys and values go into every row of the cache that has them."""
    device, logits = source.device, []
    for first, part in _parts(prompts):
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # [P + 1]
        rows = ((source >= first) & (source < first + len(part))).nonzero()[:, 0]
        mine = source[rows] - first  # [rows] prompt of this part
        of_row = torch.arange(len(rows), device=device).repeat_interleave(lengths[mine])  # an entry per row and token
        inside = torch.arange(len(of_row), device=device) - (lengths[mine].cumsum(0) - lengths[mine])[of_row]
        columns, places = (cache.used - lengths[mine])[of_row] + inside, bounds[mine][of_row] + inside
        sizes = [len(prompt) for prompt in part]
        blocks = AttentionBlocks.of(sizes, sizes, device)
        attend = _PromptAttention(cache, platform, blocks, rows[of_row], columns, places)
        tokens = torch.tensor([token for prompt in part for token in prompt], device=device)
        positions = torch.arange(len(tokens), device=device) - bounds[:-1].repeat_interleave(lengths)
        logits.append(decoder.logits(decoder.hidden_states(tokens, positions, attend)[bounds[1:] - 1]))
    return torch.cat(logits)


class _PromptAttention:
    """Attention inside prompts that lie end to end; token ``places[i]`` also goes to ``rows[i], columns[i]``."""

    def __init__(
        self,
        cache: KeyValueCache,
        platform: Platform,
        blocks: AttentionBlocks,
        rows: Tensor,
        columns: Tensor,
        places: Tensor,
    ) -> None:
        self._cache, self._attention, self._blocks = cache, platform.packed_attention, blocks
        self._rows, self._columns, self._places = rows, columns, places

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._cache.put_prompts(layer, self._rows, self._columns, key[self._places], value[self._places])
        return self._attention(query, key, value, self._blocks, scale)


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
