"""Python files that a recipe names: finding one, loading a function from it, and the line at which it went wrong."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlxf.core.errors import ConfigError, RlxfError

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def file_of_module(name: str) -> Path | None:
    """The file of an importable module with a dotted name, such as ``rlxf.tools.tiny.truth``; None if it is none.

    Raises:
        ConfigError: a package around it cannot be imported.
    """
    if not _MODULE.fullmatch(name) or name.endswith(".py"):
        return None
    try:
        spec = importlib.util.find_spec(name)  # runs the packages around the module
    except (ImportError, ValueError):  # no such package
        return None
    except RlxfError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name}: the package around it cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def load_function(path: Path, name: str, *, key: str, signature: str, asynchronous: bool = False) -> Callable[..., Any]:
    """The function ``name`` of a Python file, which is run for that.

    Args:
        path: the file.
        name: of the function.
        key: of the recipe, which names the file.
        signature: what the function should look like, for messages.
        asynchronous: whether an ``async def`` will do.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    place = f"{key}={path}"
    if not path.is_file():
        raise ConfigError(f"{place}: no such file; expected a Python file with `{signature}`")
    module_name = f"rlxf_{name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:
        raise ConfigError(f"{place}: cannot be loaded: {describe(error, path)}") from error
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"{place}: defines no function `{name}`; expected `{signature}`")
    if not callable(function) or (inspect.iscoroutinefunction(function) and not asynchronous):
        kind = "is asynchronous" if callable(function) else f"is a {type(function).__name__}"
        raise ConfigError(f"{place}: `{name}` {kind}; expected a function, `{signature}`")
    found: Callable[..., Any] = function
    return found


def describe(error: Exception, path: Path) -> str:
    """Type and text of an error, and the line of the file at which it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _is_same(frame, path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    place = f"{path}:{lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"


def _is_same(frame: traceback.FrameSummary, path: Path) -> bool:
    return Path(frame.filename).resolve() == path.resolve()
