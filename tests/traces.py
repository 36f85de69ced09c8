"""Reads a trace as Perfetto does: event after event, whether or not the array is closed or its last line is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Box:
    """One complete event, with the name of its row."""

    row: str
    stage: str
    step: int
    version: int | None
    begin: int  # microseconds
    end: int


def read_events(text: str) -> list[dict[str, Any]]:
    """Every whole event of a file, which may end anywhere."""
    assert "[\n".startswith(text[:2])
    decoder, events, at = json.JSONDecoder(), [], 1
    while True:
        while at < len(text) and text[at] in ", \n\r\t":
            at += 1
        try:
            event, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return events
        events.append(event)


def read_boxes(path: Path) -> list[Box]:
    """Every box, in the order of the file; each row is named before its first box, and always by the same numbers."""
    names: dict[tuple[int, int], str] = {}
    boxes = []
    for event in read_events(path.read_text()):
        if event["ph"] == "X":
            row = names[event["pid"], event["tid"]]
            step, version = event["args"]["step"], event["args"].get("version")
            boxes.append(Box(row, event["name"], step, version, event["ts"], event["ts"] + event["dur"]))
        elif event["name"] == "thread_name":
            ids, name = (event["pid"], event["tid"]), event["args"]["name"]
            assert names.setdefault(ids, name) == name
    return boxes


def overlaps(boxes: list[Box]) -> list[tuple[Box, Box]]:
    """Boxes of a row that lie over each other, which no viewer can draw."""
    found = []
    for row in {box.row for box in boxes}:
        mine = sorted((box for box in boxes if box.row == row), key=lambda box: (box.begin, box.end))
        found += [(one, other) for one, other in pairwise(mine) if other.begin < one.end]
    return found
