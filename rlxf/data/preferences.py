"""Preference pairs from a file, tokenized as TRL's `DPOTrainer` does, so that the two train on the same tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlxf.config.roles import DataConfig
from rlxf.core.jsonl import Row, describe
from rlxf.core.types import Pairs, RewardPairs, Sequences
from rlxf.data.batches import DropReason
from rlxf.data.fields import BadRow, common_start
from rlxf.data.formats import Layout
from rlxf.data.readers import Part
from rlxf.data.source import DataSource
from rlxf.data.table import DataSettings
from rlxf.data.text import shorten_left
from rlxf.data.tokenized import Content, TokenIds
from rlxf.models.encoding import encode_chat, encode_string, with_eos
from rlxf.models.endings import Endings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


_LARGEST_MARGIN = 2.0**127  # more is no finite float32


class PairRecord(NamedTuple):
    """The content of a row: texts of one kind, all strings, all chat messages or all token ids."""

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float


class PairIds(NamedTuple):
    """One pair, tokenized."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float


class PreferenceFile(DataSource[PairRecord, PairIds, Pairs]):
    """Preference pairs: ``global_batch_size`` per step; `RewardPairs` for a reward model.

    Args:
        settings: which rows.
        tokenizer: the policy's.
        part: of the rows.
        endings: the tokens that end an answer; given for a reward model, whose score is trained at a side's last token.
    """

    task = "pair"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        part: Part = "train",
        *,
        endings: Endings | None = None,
    ) -> None:
        self._with_margin = endings is not None
        self._warned = False
        self._endings = endings
        super().__init__(settings, tokenizer, part)

    def _take(self, layout: Layout, row: Row) -> PairRecord:
        return PairRecord(*layout.pair(row), _margin(row, self._config.margin_key if self._with_margin else None))

    def _text(self, record: PairRecord) -> Content:
        return record.prompt

    def _make(self, row: int, record: PairRecord) -> PairIds | DropReason:
        config = self._config
        prompt, chosen, rejected = self._encode(record.prompt, record.chosen, record.rejected)
        if self._endings is not None:
            chosen, rejected = self._endings.cut(chosen), self._endings.cut(rejected)
        if chosen == rejected:
            return DropReason("chosen and rejected are the same tokens")
        if not prompt:
            return DropReason("no token of the prompt is left once it is tokenized together with its completions")
        room = min(config.max_prompt_length, config.seq_length - max(len(chosen), len(rejected)))
        if len(prompt) > room:
            if config.prompt_overflow == "error":
                return DropReason(
                    f"the prompt has {len(prompt)} tokens, more than {_limit(room, config)}", is_error=True
                )
            if config.prompt_overflow == "drop" or room < 1:
                return DropReason(f"the prompt is longer than {_limit(room, config)}")
            prompt = shorten_left(prompt, room, self._tokenizer.bos_token_id)
        return PairIds(prompt, chosen, rejected, record.margin)

    def _collate(self, items: Sequence[PairIds]) -> Pairs:
        prompts = [item.prompt for item in items]
        chosen = Sequences.from_rows(prompts, [item.chosen for item in items])
        rejected = Sequences.from_rows(prompts, [item.rejected for item in items])
        if not self._with_margin:
            return Pairs(chosen=chosen, rejected=rejected)
        margin = torch.tensor([item.margin for item in items], dtype=torch.float32)
        return RewardPairs(chosen=chosen, rejected=rejected, margin=margin)

    def _encode(self, prompt: Content, chosen: Content, rejected: Content) -> tuple[list[int], list[int], list[int]]:
        """Token ids, split at the first token that differs between the prompt alone and with its completions.

        Usually that is the end of the prompt. If the tokenizer or the template writes the end of the prompt differently
        when a completion follows, the differing tokens are left out.
        """
        if isinstance(prompt, TokenIds):
            assert isinstance(chosen, TokenIds)  # a row's three texts are of one kind: checked when it was opened
            assert isinstance(rejected, TokenIds)
            return prompt.ids, chosen.ids, rejected.ids
        if isinstance(prompt, str):
            texts = [prompt, *(with_eos(f"{prompt}{side}", self._tokenizer.eos_token) for side in (chosen, rejected))]
            alone, with_chosen, with_rejected = (encode_string(self._tokenizer, text) for text in texts)
        else:
            assert isinstance(chosen, list)  # a row's three texts are of one kind: checked when the file was opened
            assert isinstance(rejected, list)
            alone = encode_chat(self._tokenizer, prompt, add_generation_prompt=True)
            with_chosen = encode_chat(self._tokenizer, prompt + chosen)
            with_rejected = encode_chat(self._tokenizer, prompt + rejected)
        shared = min(common_start(alone, with_chosen), common_start(alone, with_rejected))
        if shared < len(alone) and not self._warned:
            self._warned = True
            log.warning(
                "%s: a prompt has other tokens when a completion follows it; the differing tokens at its end are left "
                "out of the training sequences (first seen: %r)",
                self._table.name,
                self._tokenizer.decode(alone[shared:]),
            )
        return alone[:shared], with_chosen[shared:], with_rejected[shared:]


def _margin(row: Row, column: str | None) -> float:
    """How much better chosen is according to the data: a finite number (a text in CSV files); 0 without a column."""
    if column is None:
        return 0.0
    if column not in row:
        raise BadRow(
            f"field {column!r} (actor_rollout.margin_key) is missing; the row has: {', '.join(map(repr, row))}"
        )
    value: Any = row[column]
    try:
        margin = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not abs(margin) < _LARGEST_MARGIN:  # `not`, so that NaN is refused as well
        raise BadRow(f"field {column!r} (actor_rollout.margin_key): expected a finite number, got {describe(value)}")
    return margin


def _limit(room: int, config: DataConfig) -> str:
    if room == config.max_prompt_length:
        return f"actor_rollout.max_prompt_length={config.max_prompt_length}"
    return f"what its completions leave of actor_rollout.seq_length={config.seq_length}"
