"""Where the Ray cluster is that a run would join. Does not import Ray: a dry run on a laptop answers in a second."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from rlxf.core.errors import PlacementError

_CONNECT_S = 2.0  # longest wait for a cluster's address to answer


def running_cluster() -> str | None:
    """The address of the Ray cluster that a run started now would join; Ray itself is not imported.

    Raises:
        PlacementError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    wanted = os.environ.get("RAY_ADDRESS", "")
    if wanted == "local" or "://" in wanted:
        return None if wanted == "local" else wanted
    if wanted and wanted != "auto":
        if not _answers(wanted):
            raise PlacementError(
                f"RAY_ADDRESS = {wanted}: no Ray cluster answers there; start it, or unset RAY_ADDRESS"
            )
        return wanted
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # where Ray itself looks
    record = Path(base) / "ray" / "ray_current_cluster"  # `ray start` writes it and `ray stop` removes it
    address = record.read_text(encoding="utf-8").strip() if record.is_file() else ""
    if address and _answers(address):
        return address
    if wanted == "auto":
        raise PlacementError("RAY_ADDRESS = auto: no Ray cluster runs on this machine; start it, or unset RAY_ADDRESS")
    return None


def present_token() -> None:
    """Let Ray show the user's token to the cluster that it joins, unless ``RAY_AUTH_MODE`` is set.

    By itself it does so only at an address that it found on its own. Has no effect once Ray is imported.
    """
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def _has_token() -> bool:
    """Where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    file = os.path.expanduser(path)  # as it is where there is no home folder
    return os.path.isfile(file) and os.path.getsize(file) > 0


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False
