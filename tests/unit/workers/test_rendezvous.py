"""Many groups that start at the same time on one machine: nobody takes another's port."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

from workers.worker import Worker

GROUPS = 20


def _first(to_second: Connection, all_hold: Connection) -> None:
    """Rank 0 of a group: holds a port, tells it, and opens the group's store on it once every group holds one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in torch's own list

    worker = Worker(0, 2)
    port = worker.address()[1]
    to_second.send(port)
    all_hold.recv()
    assert worker._listener is not None
    store = TCPStore("127.0.0.1", port, 2, is_master=True, master_listen_fd=worker._listener.detach())
    store.set("port", str(port))
    store.wait(["seen"])


def _second(from_first: Connection, told: Connection) -> None:
    """Rank 1: joins, and reads whose store it is."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in torch's own list

    port = from_first.recv()
    told.send(port)
    store = TCPStore("127.0.0.1", port, 2, is_master=False)
    told.send(int(store.get("port")))
    store.set("seen", "1")


def test_twenty_groups_that_start_at_once_find_each_other() -> None:
    context = multiprocessing.get_context("fork")  # nothing is imported again, 40 times
    processes, gates, ends = [], [], []
    for _ in range(GROUPS):
        (gate, held), (of_first, to_second), (end, told) = (context.Pipe() for _ in range(3))
        for target, pipes in ((_first, (to_second, held)), (_second, (of_first, told))):
            processes.append(context.Process(target=target, args=pipes, daemon=True))
        gates.append(gate)
        ends.append(end)
    try:
        for process in processes:
            process.start()
        ports = [_received(end) for end in ends]
        assert len(set(ports)) == GROUPS
        for gate in gates:
            gate.send(None)
        assert [_received(end) for end in ends] == ports
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def _received(end: Connection) -> int:
    assert end.poll(60), "a group does not answer"
    port: int = end.recv()
    return port
