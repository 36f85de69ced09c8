"""``dry_run=true``: print the placement plan, and hold it against the cluster that is running, if there is one."""

from __future__ import annotations

import sys

from rlxf.config.schema import RunConfig
from rlxf.errors import PlacementError
from rlxf.plan import NodeResources, fit, make_plan
from rlxf.plan_text import describe, describe_nodes
from workers.address import running_cluster


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


def _nodes_of(address: str) -> list[NodeResources]:
    import ray

    from workers.cluster import join
    from workers.pools import cluster_nodes

    join(address)
    try:
        return cluster_nodes()
    finally:
        ray.shutdown()
