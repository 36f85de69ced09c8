"""Storage that all nodes of a run must share: each process writes a token into the folder and looks for the others'."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlxf.core.errors import CheckpointError, RlxfError
from rlxf.core.files import fsync

from .pools import node_ids
from .remote import Pending

if TYPE_CHECKING:
    from .group import Member, WorkerGroup

log = logging.getLogger(__name__)

SEEN_S = 40.0  # a network file system may keep what it knows of a folder for so long
_PAUSE_S = 0.5
_ANSWER_S = 60.0


def require_shared_storage(folder: Path, key: str, group: WorkerGroup, *, ranks: Sequence[int] | None = None) -> None:
    """Refuse a folder that the driver and some ranks of ``group`` do not share. Nothing is asked within one node.

    Args:
        folder: exists on the driver's node.
        key: the recipe's key that names it.
        group: the processes that write there.
        ranks: those of them that do; None: all.

    Raises:
        CheckpointError: names a node, the folder and the key.
    """
    members = [group.members[rank] for rank in (range(len(group.members)) if ranks is None else ranks)]
    here = _this_node()
    if {member.node for member in members} <= {here}:
        return

    def ask(method: str, arguments: Sequence[tuple[object, ...]]) -> list[Any]:
        calls = [
            Pending(getattr(member.handle, method).remote(*given), member.name, method)
            for member, given in zip(members, arguments, strict=True)
        ]
        return group.waiter.gather(calls, _ANSWER_S)

    check_tokens(folder, key, members, here=here, ask=ask)


Ask = Callable[[str, Sequence[tuple[object, ...]]], Sequence[Any]]


def check_tokens(folder: Path, key: str, members: Sequence[Member], *, here: str, ask: Ask) -> None:
    """``require_shared_storage`` for any way to ask the members, which answer in their order.

    Args:
        folder: as above.
        key: as above.
        members: who writes there besides this process.
        here: name of this process's node.
        ask: calls a worker's method on each member, with the member's arguments.

    Raises:
        CheckpointError: as above.
    """
    run = secrets.token_hex(8)
    own, names = f".token_{run}", [f".token_{run}_{number}" for number in range(len(members))]
    nodes = {own: here} | {name: member.node for member, name in zip(members, names, strict=True)}
    fix = f"all nodes that train write there: name a folder on storage that they share in {key}"
    try:
        if problem := write_token(folder, own):
            raise CheckpointError(f"{folder}: node {here} cannot write there: {problem}; {fix}")
        written = ask("storage_token", [(folder, name) for name in names])
        for member, answer in zip(members, written, strict=True):
            if answer:
                raise CheckpointError(f"{folder}: node {member.node} cannot write there: {answer}; {fix}")
        everything = tuple(nodes)
        answers = ask("missing_tokens", [(folder, everything)] * len(members))
        unseen = [(member.node, found) for member, found in zip(members, answers, strict=True) if found]
        if not unseen and (missing := missing_tokens(folder, everything)):
            unseen = [(here, missing)]
        if unseen:
            node, (name, *_) = unseen[0]
            raise CheckpointError(
                f"{folder}: node {node} does not see what node {nodes[name]} has written there, so the folder is not "
                f"the same on both; {fix}"
            )
    finally:
        _clean_up(folder, own, names, ask)


def _clean_up(folder: Path, own: str, names: Sequence[str], ask: Ask) -> None:
    for name in (own, *names):
        remove_token(folder, name)
    try:
        ask("storage_token", [(folder, name, False) for name in names])
    except RlxfError as error:  # the run does not depend on it
        log.debug("a token may be left in %s", folder, exc_info=error)


def write_token(folder: Path, name: str) -> str | None:
    """Write a token; what is wrong, in the system's words, or None. The folder is not made: it should be there."""
    try:
        (folder / name).write_text(f"process {os.getpid()}\n")
        fsync(folder / name)
    except OSError as error:
        return error.strerror or str(error)
    return None


def remove_token(folder: Path, name: str) -> str | None:
    """Delete a token that this process wrote."""
    with suppress(OSError):
        (folder / name).unlink(missing_ok=True)
    return None


def missing_tokens(folder: Path, names: Sequence[str], patience_s: float | None = None) -> list[str]:
    """The tokens that this process does not see, after waiting ``patience_s`` for them (None: for ``SEEN_S``)."""
    end = time.monotonic() + (SEEN_S if patience_s is None else patience_s)
    while True:
        missing = [name for name in names if not _is_seen(folder / name)]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(_PAUSE_S)


def _is_seen(path: Path) -> bool:
    try:
        return bool(path.read_text())
    except OSError:
        return False


def _this_node() -> str:
    """The name that the run gives this process's node."""
    me = ray.get_runtime_context().get_node_id()
    return next((name for name, node in node_ids().items() if node == me), "of the driver")
