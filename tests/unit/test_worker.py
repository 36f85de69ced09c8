"""What Ray's worker processes have in common, without a cluster."""

from __future__ import annotations

import socket

import pytest

from workers.worker import Worker


def test_the_port_of_a_groups_rendezvous_is_held_from_the_start() -> None:
    worker = Worker(0, 2)
    _, port = worker.address()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))


def test_a_group_of_one_needs_no_port() -> None:
    assert Worker(0, 1).address() == ("127.0.0.1", 0)
