"""The rows that docs/data.md shows are read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlxf.config.roles import ActorConfig
from rlxf.data.formats import Task, find_layout

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
TASKS: dict[str, set[Task]] = {
    "Prompts": {"prompt"},
    "Preference pairs": {"prompt", "pair"},
    "Prompt and completion": {"prompt", "example"},
    "Messages": {"prompt", "example"},
    "Alpaca": {"prompt", "pair", "example"},
    "ShareGPT": {"prompt", "pair", "example"},
}


def shown() -> list[tuple[str, str]]:
    found, heading = [], ""
    for block in re.split(r"^(#+ .*|```json\n(?:.*\n)*?```)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if block.startswith("#"):
            heading = block.lstrip("# ")
        elif block.startswith("```json"):
            found += [(heading, row) for row in block.splitlines()[1:-1]]
    return found


def test_every_format_shows_three_rows() -> None:
    headings = [heading for heading, _ in shown()]
    assert set(headings) == set(TASKS)
    assert all(headings.count(heading) >= 3 for heading in TASKS)


@pytest.mark.parametrize(("heading", "text"), shown())
def test_a_shown_row_can_be_read_for_its_stage(heading: str, text: str) -> None:
    row = json.loads(text)
    tasks = TASKS[heading]
    if heading in ("Alpaca", "ShareGPT"):
        tasks = {"prompt", "pair"} if "chosen" in row else {"prompt", "example"}
    for task in tasks:
        layout = find_layout(row, ActorConfig(model="tiny"), task)
        {"prompt": layout.prompt, "pair": layout.pair, "example": layout.example}[task](row)
