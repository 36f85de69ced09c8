"""Rows that hold token ids: what `scripts/preprocess_data.py`, or MindSpeed-LLM's, wrote."""

from __future__ import annotations

from dataclasses import dataclass

from rlxf.core.jsonl import Row
from rlxf.core.types import Text
from rlxf.data.fields import BadRow

IGNORED = -100  # the label of a token that no loss counts


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A text that is tokenized already."""

    ids: list[int]
    labels: list[int] | None = None  # of an example: each token, or -100 where the loss does not count it


Content = Text | TokenIds
_OWN = ("input_ids", "attention_mask", "chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The layout of such rows: prompts, preference pairs or examples. Other keys hold further tokenized texts."""

    has_labels: bool  # whether "labels" says which tokens count; else it is another text

    @property
    def prompt_columns(self) -> frozenset[str]:
        return frozenset((*_OWN, "labels")) if self.has_labels else frozenset(_OWN)

    def prompt(self, row: Row) -> Content:
        """The whole row; of pairs and examples what comes before the first token that counts."""
        if "chosen_input_ids" in row:
            return self.pair(row)[0]
        if self.has_labels and "labels" in row:
            return TokenIds(row["input_ids"][: _first_counted(row, "input_ids", "labels")])
        return TokenIds(_ids(row, "input_ids"))

    def pair(self, row: Row) -> tuple[Content, Content, Content]:
        cuts = {_first_counted(row, f"{side}_input_ids", f"{side}_labels") for side in ("chosen", "rejected")}
        chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
        cut = min(cuts)
        if len(cuts) > 1 or chosen[:cut] != rejected[:cut]:
            raise BadRow("chosen and rejected begin with different prompts")
        return TokenIds(chosen[:cut]), TokenIds(chosen[cut:]), TokenIds(rejected[cut:])

    def example(self, row: Row) -> tuple[Content, Content]:
        """The tokens up to the last one that counts, with their labels; the second text is empty."""
        _first_counted(row, "input_ids", "labels")
        if max(row.get("attention_mask", (1,))) > 1:
            raise BadRow(
                "several examples in one row, as --neat-pack writes them; preprocess without --pack, for the "
                "micro-batches of a run are packed anyway"
            )
        labels = row["labels"]
        end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        return TokenIds(row["input_ids"][:end], labels[:end]), TokenIds([])


def is_tokenized(row: Row) -> bool:
    """Whether a row is one of an indexed file; text files have no lists of numbers in these columns."""
    ids = row.get("input_ids", row.get("chosen_input_ids"))
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], int)


def tokenized_layout(row: Row) -> Tokenized:
    """The layout of an indexed file by its first row."""
    labels = row.get("labels", [])
    return Tokenized(has_labels=IGNORED in labels and len(labels) == len(row["input_ids"]))


def _ids(row: Row, key: str) -> list[int]:
    if not row.get(key):
        has = ", ".join(row) or "none"
        raise BadRow(
            f"no tokens under {key!r}; the files have {has}: another --handler-name writes what is wanted here"
        )
    ids: list[int] = row[key]
    return ids


def _first_counted(row: Row, ids_key: str, labels_key: str) -> int:
    ids, labels = _ids(row, ids_key), _ids(row, labels_key)
    if len(ids) != len(labels):
        raise BadRow(f"{len(ids)} tokens in {ids_key!r}, but {len(labels)} labels in {labels_key!r}")
    first = next((place for place, label in enumerate(labels) if label != IGNORED), None)
    if not first:
        raise BadRow(f"{labels_key!r} counts {'no token' if first is None else 'the first token, which none precedes'}")
    return first
