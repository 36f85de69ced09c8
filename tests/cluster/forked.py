"""``python`` in few milliseconds: hands a program on to the process of ``nursery.py``, and ends as that program ends.

    python -I -S forked.py SOCKET PYTHON ARGUMENTS ...

is ``PYTHON ARGUMENTS ...`` for the programs that the nursery runs; every other one is run by that Python itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

FORKED = ("default_worker.py", "ray_gpt.py", "tests.cluster.faults", "tests.cluster.recorded")
PASSED_BY = ("-m", "setup_worker.py")  # with the program that they run after them
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    address, python, *arguments = sys.argv[1:]
    program = next((word for word in map(os.path.basename, arguments) if word not in PASSED_BY), "")
    if program not in FORKED:
        os.execv(python, [python, *arguments])
    asked = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(asked).to_bytes(8, "big")], [1, 2])
        connection.sendall(asked)
        pid = int.from_bytes(connection.recv(8), "big")
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        ended = connection.recv(8)
    if not ended:
        raise SystemExit("the nursery is lost; its log is beside its socket")
    status = int.from_bytes(ended, "big")
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number  # of a signal that ends nobody here


if __name__ == "__main__":
    sys.exit(main())
