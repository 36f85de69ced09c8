"""The handlers of the preprocessing by name, and the columns that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlxf.core.errors import ConfigError, DataError
from rlxf.core.jsonl import Row
from rlxf.core.types import Messages
from rlxf.core.words import nearest
from rlxf.data.fields import BadRow, Pair
from rlxf.data.instructions import ALPACA, Alpaca, ShareGpt
from rlxf.data.text import text_problem


@dataclass(frozen=True, slots=True)
class Handler:
    """What a handler's name stands for: the layout of its rows and what is made of them."""

    style: Literal["alpaca", "sharegpt", "text"]
    makes: Literal["prompt", "pair", "example", "text"]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the files it writes; those of "text" are the columns themselves."""
        return {
            "prompt": ("input_ids", "attention_mask"),
            "pair": ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
            "example": ("input_ids", "attention_mask", "labels"),
            "text": (),
        }[self.makes]


HANDLERS: Mapping[str, Handler] = {
    "GeneralPretrainHandler": Handler("text", "text"),
    "AlpacaStyleInstructionHandler": Handler("alpaca", "example"),
    "SharegptStyleInstructionHandler": Handler("sharegpt", "example"),
    "AlpacaStylePairwiseHandler": Handler("alpaca", "pair"),
    "SharegptStylePairwiseHandler": Handler("sharegpt", "pair"),
    "PPOAlpacaStyleInstructionHandler": Handler("alpaca", "prompt"),
    "R1AlpacaStyleInstructionHandler": Handler("alpaca", "prompt"),
    "R1SharegptStyleInstructionHandler": Handler("sharegpt", "prompt"),
}


def find_handler(name: str) -> Handler:
    """Raises ConfigError: there is no handler of that name."""
    if name in HANDLERS:
        return HANDLERS[name]
    close = nearest(name, HANDLERS)
    hint = f' Did you mean "{close}"?' if close else ""
    raise ConfigError(f'--handler-name "{name}" is not a handler.{hint} Known: {", ".join(HANDLERS)}.')


_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_MAP_KEYS = {
    "alpaca": ("prompt", "query", "response", "history", "system", "chosen", "rejected"),
    "sharegpt": ("messages", "tags", "system", "chosen", "rejected"),
    "text": (),
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a handler finds its texts: `--map-keys` over the defaults of its style.

    Raises:
        ConfigError: a key that the style does not have, or a value that is no column name.
    """

    handler: Handler
    own: Mapping[str, Any]  # as given: name -> column, '' for none

    def __post_init__(self) -> None:
        known = _MAP_KEYS[self.handler.style]
        for name, column in self.own.items():
            if name not in known:
                close = nearest(name, known)
                hint = f' Did you mean "{close}"?' if close else ""
                has = f"known: {', '.join(known)}" if known else "this handler has none; use --json-keys"
                raise ConfigError(f'--map-keys: "{name}" is not a key.{hint} It is a JSON object; {has}.')
            if name == "tags":
                _check_tags(column)
            elif not isinstance(column, str):
                raise ConfigError(f"--map-keys: {name} must be a column name or an empty string, got {column!r}")

    def layout(self) -> Alpaca | ShareGpt:
        own = {("prompt" if name == "messages" else name): column for name, column in self.own.items()}
        if self.handler.style == "alpaca":
            return Alpaca({**ALPACA, **own})
        own.pop("tags", None)
        return ShareGpt({**ALPACA, "prompt": "conversations", **own})

    def with_standard_tags(self, row: Row) -> Row:
        """A ShareGPT row with the names of speakers and fields that `ShareGpt` reads, where the user's are others."""
        if "tags" not in self.own:
            return row
        tags = {**_TAGS, **self.own["tags"]}
        speakers = {tags[name]: _TAGS[name] for name in _TAGS if name.endswith("_tag") and name not in _FIELDS}
        columns = self.layout().columns
        return row | {
            columns[name]: _retag(row[columns[name]], tags, speakers)
            for name in ("prompt", "chosen", "rejected")
            if columns[name] in row
        }

    def listed_pair(self, row: Row) -> Pair | None:
        """The pair of an Alpaca row whose chosen and rejected columns are lists [chosen, rejected], else None."""
        layout = self.layout()
        both: list[Any] = [row.get(layout.columns[name]) for name in ("chosen", "rejected")]
        if not all(isinstance(side, list) and len(side) == 2 and isinstance(side[0], str) for side in both):
            return None
        sides: list[Messages] = []
        for text, name in ((both[0][0], "chosen"), (both[1][1], "rejected")):
            if problem := text_problem(text, f"the {name} text"):
                raise BadRow(problem)
            sides.append([{"role": "assistant", "content": text}])
        return layout.prompt(row), sides[0], sides[1]

    def require(self, columns: Sequence[str], place: object) -> None:
        """Raises DataError: a column that must be there is in none of the rows."""
        layout, makes = self.layout(), self.handler.makes
        names = {"prompt": ["prompt"], "pair": ["prompt", "chosen", "rejected"], "example": ["prompt"]}[makes]
        if makes == "example" and self.handler.style == "alpaca":
            names.append("response")
        named = [column for name, column in self.own.items() if column and name != "tags"]
        for column in dict.fromkeys([*(layout.columns[name] for name in names), *named]):
            if column not in columns:
                close = nearest(column, columns)
                hint = f' Did you mean "{close}"?' if close else ""
                raise DataError(
                    f'{place}: no row has a column "{column}".{hint} The columns are: {", ".join(columns)}; '
                    "--map-keys chooses which of them to read"
                )


_FIELDS = ("role_tag", "content_tag")


def _retag(turns: Any, tags: Mapping[str, str], speakers: Mapping[str, str]) -> Any:
    if isinstance(turns, list):
        return [_retag(turn, tags, speakers) for turn in turns]
    if not isinstance(turns, dict) or tags["role_tag"] not in turns or tags["content_tag"] not in turns:
        return turns  # the layout says what is wrong with it
    speaker = turns[tags["role_tag"]]
    return {"from": speakers.get(speaker, speaker), "value": turns[tags["content_tag"]]}


def _check_tags(tags: Any) -> None:
    if not isinstance(tags, dict) or not all(isinstance(tag, str) for tag in tags.values()):
        raise ConfigError(f"--map-keys: tags must be an object of texts, got {tags!r}")
    for name in tags:
        if name not in _TAGS:
            raise ConfigError(f'--map-keys: "{name}" is not a tag; known: {", ".join(_TAGS)}')
