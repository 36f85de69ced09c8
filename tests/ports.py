"""TCP ports for what a test starts."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that nobody listens on now; another program may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
