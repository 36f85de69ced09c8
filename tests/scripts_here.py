"""Scripts run in the process of the test: what they patch is patched, and nothing is imported twice."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> Callable[..., int]:
    """``scripts/<name>.py`` as a function of the arguments that are typed; it gives the exit code."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> int:
        before = sys.argv
        sys.argv = [f"{name}.py", *map(str, arguments)]
        try:
            return int(module.main())
        finally:
            sys.argv = before

    return call
