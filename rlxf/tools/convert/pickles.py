"""Reading ``torch.save`` files of other people without running what is in them."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import torch

from rlxf.core.errors import ModelError, RlxfError

# Packages whose classes the reference saves beside the weights (settings, random states). None of them is needed here,
# so none is imported: each becomes a `_StandIn`.
_NOT_NEEDED = ("megatron.", "mindspeed.", "mindspeed_llm.", "numpy.")
_NEVER = ("os.", "posix.", "nt.", "sys.")  # torch refuses these, whatever is allowed
_PLAIN = f"{argparse.Namespace.__module__}.{argparse.Namespace.__name__}"


class _StandIn:
    """Takes the place of an object in a pickle that is not needed, and runs none of its code."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_pickle(path: Path, *, trust_pickle: bool) -> Any:
    """What a file of ``torch.save`` holds: tensors, plain values, and stand-ins for other objects of training.

    Args:
        path: of the file; tensors of a zip file are mapped, not copied.
        trust_pickle: let it use any class that is installed here.

    Raises:
        ModelError: it is damaged, or asks for something that it may not use; nothing of that was run.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # torch before 1.6 wrote bare pickles; reading shows what they need
    try:
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {_PLAIN} if is_zip else set[str]()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be read: {_first_line(error)}") from error
    while True:
        blocked = sorted(name for name in wanted if not name.startswith(_NOT_NEEDED))
        if never := [name for name in blocked if name.startswith(_NEVER)]:
            raise ModelError(
                f"{path}: its pickle asks for {', '.join(never)}, which no checkpoint needs; do not load it"
            )
        if blocked and not trust_pickle:
            raise ModelError(_refusal(path, ", ".join(blocked)))
        stand_ins = [(_StandIn, name) for name in wanted.difference(blocked)]
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *stand_ins, *map(_found, blocked)]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except RlxfError:
            raise
        except Exception as error:  # torch raises nearly any type on a damaged file
            asked = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
            if asked is None or asked[1] in wanted:
                raise ModelError(f"{path}: cannot be read: {_first_line(error)}") from error
            wanted.add(asked[1])


def _refusal(path: Path, names: str) -> str:
    return (
        f"{path}: its pickle asks for {names}, which is neither a tensor nor a plain value; loading it can run code. "
        "Add --trust-pickle if the file is from people that you trust"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _found(name: str) -> Any:
    """The class or function of that name, for a file that the user trusts."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"{name}, which the checkpoint's pickle asks for, is not installed here ({error})") from error
