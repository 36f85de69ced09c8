"""What the data of all stages have in common: batches of a part of the rows, a step at a time."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from rlxf.core.errors import DataError, ModelError
from rlxf.core.jsonl import Row
from rlxf.data.batches import MALFORMED, BatchStream, DropReason
from rlxf.data.formats import Layout, Task
from rlxf.data.readers import Part
from rlxf.data.table import DataSettings, open_table, order_of
from rlxf.data.text import is_chat, require_chat_template
from rlxf.data.tokenized import Content, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Record = TypeVar("Record")  # what is taken from a row
Item = TypeVar("Item")  # its token ids
Collated = TypeVar("Collated")  # the items of a step, as the other rooms take them


class DataSource(ABC, Generic[Record, Item, Collated]):
    """``global_batch_size`` items per step: each row read when the data is opened, tokenized when it is asked for.

    ``part``: training rows are shuffled, epoch after epoch; validation and test rows come in file order.
    """

    task: ClassVar[Task]
    ends_with_eos: ClassVar[bool] = True  # strings are completed to whole texts, which end with EOS

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, part: Part = "train") -> None:
        self._config = settings.config
        self._tokenizer = tokenizer
        self._batch_size = settings.batch_size
        self._has_chat = self._has_strings = False
        self._refused: dict[int, str] = {}  # rows that cannot be tokenized, and why
        self._table = open_table(settings, part, self.task, self._read)
        self._require_able_tokenizer()
        order = order_of(self._table, settings, part)
        self._num_rows = order.num_rows
        self._try_one()
        strict = part == "train" and self._config.prompt_overflow == "error"
        self._batches: BatchStream[Item] = BatchStream(
            self._table, order, self._batch_size, self._make_named, strict=strict
        )

    def __len__(self) -> int:
        """Rows of the part."""
        return self._num_rows

    def next_batch(self, step: int) -> Collated:
        """The items of a step. Earlier requests do not change them."""
        return self._collate(self._batches.batch(step))

    def row_ids(self, step: int) -> list[int]:
        """The numbers of the rows that a step is made of."""
        return self._batches.rows(step)

    def epoch(self, step: int) -> float:
        """Passes over the rows at the end of a step; rows that were left out are part of a pass."""
        return self._batches.epoch(step)

    def stream(self, step: int) -> dict[str, Any]:
        """What ``go_on`` needs to begin at the newest step, as JSON data."""
        return {**self._batches.stream(step), "refused": {str(row): text for row, text in self._refused.items()}}

    def go_on(self, step: int, rows: Sequence[int], stream: Mapping[str, Any]) -> bool:
        """Begin at ``step`` without tokenizing what came before. False: the step before had other rows."""
        if not self._batches.go_on(step, rows, stream):
            return False
        self._refused |= {int(row): text for row, text in stream["refused"].items()}
        return True

    def num_kept(self) -> int:
        """Rows of the part that give an item. Tokenizes every row that no step has reached yet."""
        return self._batches.num_kept()

    def eval_batches(self, limit: int | None = None) -> list[Collated]:
        """The first ``limit`` items in file order (None: all), in batches of up to ``global_batch_size``."""
        items = self._items(limit)
        starts = range(0, len(items), self._batch_size)
        return [self._collate(items[start : start + self._batch_size]) for start in starts]

    def first(self, limit: int) -> Collated:
        """The first ``limit`` items in file order as one batch; all of them when there are fewer."""
        return self._collate(self._items(limit))

    @property
    def dropped(self) -> Counter[str]:
        """Rows that were left out so far, by reason, each counted once."""
        return Counter(self._batches.dropped)

    @property
    def num_dropped(self) -> int:
        return self.dropped.total()

    def log_dropped(self) -> None:
        """Log how many rows were left out so far, for which reasons, and where the first of each is."""
        for line in self._batches.summary():
            log.warning("%s", line)

    def _items(self, limit: int | None) -> list[Item]:
        return list(islice(self._batches.in_file_order(), limit))

    @abstractmethod
    def _take(self, layout: Layout, row: Row) -> Record:
        """What this stage takes from a row; raises `BadRow`."""

    @abstractmethod
    def _text(self, record: Record) -> Content:
        """One of the record's texts; all are of one kind."""

    @abstractmethod
    def _make(self, row: int, record: Record) -> Item | DropReason:
        """The token ids of a row, or why there are none."""

    @abstractmethod
    def _collate(self, items: Sequence[Item]) -> Collated: ...

    def _read(self, layout: Layout, row: Row) -> Record:
        record = self._take(layout, row)
        if isinstance(self._text(record), TokenIds):
            return record
        chat = is_chat(self._text(record))
        self._has_chat |= chat
        self._has_strings |= not chat
        return record

    def _make_named(self, row: int) -> Item | DropReason:
        try:
            return self._make(row, self._table[row])
        except DataError as error:  # the template refuses the row
            self._refused[row] = text = f"{self._table.where(row)}: {error}"
            if len(self._table.bad) + len(self._refused) <= self._config.max_bad_rows:
                log.warning("%s", text)
                return DropReason(MALFORMED)
            raise DataError(*self._refused.values()) from error

    def _try_one(self) -> None:
        """Tokenize a row, so that a template or tokenizer that cannot work fails at the start."""
        self._make_named(next(row for row in range(len(self._table)) if row not in self._table.bad))

    def _require_able_tokenizer(self) -> None:
        if self._has_chat:
            require_chat_template(self._tokenizer, self._table.name)
        if self._has_strings and self.ends_with_eos and self._tokenizer.eos_token is None:
            raise ModelError(
                f"{self._table.name}: holds strings, whose completions end with EOS, but the tokenizer "
                f"{self._tokenizer.name_or_path!r} has no eos_token; set it in tokenizer_config.json"
            )
