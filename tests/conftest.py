"""What every test may rely on."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

gc.disable()  # until everything is imported and collected: a million objects that stay


def pytest_collection_finish() -> None:
    """What is there now is there to the end: no garbage collection looks at it again, which takes an eighth of all
    time otherwise.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def usual_sigint() -> Iterator[None]:
    """SIGINT as in a terminal, here and in the programs that tests start.

    A shell without job control starts background jobs, such as ``nohup scripts/test.sh &``, with SIGINT ignored, and
    every program below inherits that.
    """
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
