"""The lock that admits one run to a folder of checkpoints, and the cleanup after a killed run."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlxf.checkpointing.store import PUBLISHED
from rlxf.core.disk import writing
from rlxf.core.errors import CheckpointError
from rlxf.core.files import (
    make_folder,
    remove_leftovers,
)

log = logging.getLogger(__name__)

LOCK = ".lock"  # a file in the folder of checkpoints, locked by the run that writes there


@contextmanager
def owned_checkpoints(root: Path, run_dir: Path) -> Iterator[None]:
    """Lock the checkpoint folder ``root`` for this run, and delete what a killed run left half written.

    Raises:
        CheckpointError: another run writes there now.
        DiskError: the folder cannot be written.
    """
    made = not root.exists()
    lock = root / LOCK
    with writing(root, "actor_rollout.save (or hydra.run.dir)"):
        make_folder(root)
        opened = lock.open("a+")
    with opened as file:  # the system unlocks it when this process ends, even by kill -9
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"{root}: another run writes its checkpoints there ({file.read().strip() or 'unknown'}); wait for it, "
                "or name another folder in actor_rollout.save (or hydra.run.dir)"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s: cannot be locked (%s); do not start a second run that saves there", root, error.strerror)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError:  # a full disk: the lock holds, and only its owner's name is missing
            log.debug("%s: cannot be written", lock, exc_info=True)
        remove_leftovers(root, PUBLISHED)
        remove_leftovers(run_dir, PUBLISHED)
        try:
            yield
        finally:
            if [path.name for path in root.iterdir()] == [lock.name]:  # a run that wrote nothing leaves no folder
                lock.unlink()
                if made:
                    root.rmdir()


def is_owned(root: Path) -> bool:
    """Whether a run works on the checkpoints below ``root`` now; False on a file system without locks."""
    try:
        with (root / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
