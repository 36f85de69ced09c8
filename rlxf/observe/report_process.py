"""Starts the process that keeps ``report.html`` in the run folder up to date (``rlxf/report``)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

NAME = "report.html"
_LAST_S = 10.0  # to wait for the last page of a run; it is made by a process that does not need this one any more


@contextmanager
def kept_page(folder: Path) -> Iterator[None]:
    """While the context lasts, a process of its own renews the page; the last time when it ends, whatever ends it.

    The process notices the end of this one by its standard input, so that a run that was killed has its last page, too.
    A page that cannot be made costs a line of the log, not the run.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "rlxf.report", "--follow", str(folder)]
    try:
        follower = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, and the page is to show it
        )
    except OSError as error:
        log.warning("%s is not made: %s", folder / NAME, error)
        yield
        return
    try:
        yield
    finally:
        try:
            _, said = follower.communicate(timeout=_LAST_S)
        except subprocess.TimeoutExpired:
            log.warning("%s is still being made; the run does not wait for it any longer", folder / NAME)
        else:
            if follower.returncode:
                last = said.decode(errors="replace").strip().rpartition("\n")[2]
                log.warning("%s is not made: %s", folder / NAME, last or f"exit code {follower.returncode}")
