"""The page: one HTML file with style, program, plotting library and data in it. It asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

import rlxf
from rlxf.report.content import RunContent

LIBRARY = "echarts.common.min.js"
LIBRARY_VERSION = "6.1.0"  # Apache ECharts, https://www.npmjs.com/package/echarts: dist/echarts.common.min.js
LIBRARY_SHA256 = "61f13280aba3161f77fc801bf5f9c786f55f10432153a0683fc5cc0700b013d5"
PROGRAM = (
    "show.js",
    "charts.js",
    "top.js",
    "learning.js",
    "words.js",
    "pairs.js",
    "answers.js",
    "machine.js",
    "main.js",
)
_ASSETS = files("rlxf.report.assets")
# What could end the script, or hides or turns text around it for somebody who reads the source.
_HIDDEN = re.compile(
    "[<>&\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def asset(name: str) -> str:
    """The text of a file of the page."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def as_json(data: object) -> str:
    """JSON that may stand in a script element: nothing in it ends the element, and nothing is hidden."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def make_page(runs: Sequence[RunContent], *, now: datetime, follows: bool = False) -> str:
    """The whole file.

    Args:
        runs: what it shows, in this order.
        now: when it is made.
        follows: it is renewed while the run goes on.
    """
    data = {
        "made": now.astimezone(UTC).isoformat(timespec="seconds"),
        "version": rlxf.__version__,
        "follows": follows,
        "runs": [run.data for run in runs],
        "differences": _differences(runs),
    }
    title = (
        runs[0].data["name"] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.data['label'] for run in runs)}"
    )
    program = '"use strict";\n(() => {\n' + "\n".join(asset(name) for name in PROGRAM) + "\n})();\n"
    scripts = [_inline(asset(LIBRARY)), _inline(program)]
    policy = f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; img-src data:"
    parts = {
        "title": html.escape(title.encode("utf-8", "replace").decode()),  # a folder's name may be no UTF-8
        "policy": html.escape(f"{policy}; base-uri 'none'; form-action 'none'"),
        "style": asset("page.css"),
        "library": scripts[0],
        "data": as_json(data),
        "program": scripts[1],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def _inline(program: str) -> str:
    return program.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(program: str) -> str:
    digest = hashlib.sha256(program.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _differences(runs: Sequence[RunContent]) -> list[list[str]]:
    """Keys of the recipes that differ: key, then the value of each run."""
    flat = [dict(run.keys) for run in runs]
    names = list(dict.fromkeys(name for keys in flat for name in keys))
    rows = [[name, *(keys.get(name, "-") for keys in flat)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1] if len(runs) > 1 else []
