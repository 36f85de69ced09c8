"""``dry_run=true``: print the placement plan, and hold it against the cluster that is running, if there is one."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from rlxf.config.schema import RunConfig
from rlxf.errors import PlacementError
from rlxf.plan import NodeResources, fit, make_plan
from rlxf.plan_text import describe, describe_nodes

_CONNECT_S = 2.0  # longest wait for a cluster's address to answer


def dry_run(config: RunConfig) -> None:
    """Print the plan to stdout.

    Raises:
        PlacementError: the running cluster cannot hold it.
    """
    plan = make_plan(config)
    sys.stdout.write(describe(config, plan))
    if config.runtime == "local":
        return
    address = running_cluster()
    if address is None:
        sys.stdout.write("\ncluster: none is running here\n")
        return
    nodes = _nodes_of(address)
    sys.stdout.write(f"\ncluster: {address}\n{describe_nodes(plan, nodes)}")
    problems = fit(plan, nodes)
    if problems:
        sys.stdout.flush()
        raise PlacementError("\n".join(problems))
    sys.stdout.write("it has room for this recipe\n")


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


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def _nodes_of(address: str) -> list[NodeResources]:
    import ray

    from workers.cluster import join
    from workers.pools import cluster_nodes

    join(address)
    try:
        return cluster_nodes()
    finally:
        ray.shutdown()
