"""``dry_run=true``: print the placement plan, and hold it against the cluster that is running, if there is one."""

from __future__ import annotations

import os
import sys

from rlxf.config.devices import device_facts
from rlxf.config.schema import RunConfig
from rlxf.core.errors import PlacementError
from rlxf.placement.plan import NodeResources, Plan, crowded, fit, make_plan
from rlxf.placement.text import describe, describe_nodes

from .address import running_cluster


def dry_run(config: RunConfig) -> None:
    """Print the plan to stdout.

    Raises:
        PlacementError: the running cluster cannot hold it.
    """
    plan = make_plan(config)
    _say(describe(config, plan))
    if config.runtime == "local":
        return
    address = running_cluster()
    if address is None:
        _say("\ncluster: none is running here\n")
        _say(_crowded_here(config, plan))
        return
    nodes = _nodes_of(address)
    _say(f"\ncluster: {address}\n{describe_nodes(plan, nodes)}")
    problems = fit(plan, nodes)
    if problems:
        raise PlacementError("\n".join(problems))
    _say("it has room for this recipe\n")


def _crowded_here(config: RunConfig, plan: Plan) -> str:
    """A line when a run started here would be refused; the plan may be meant for other machines, so no error."""
    if device_facts(config.training.device).ray_resource != "CPU":
        return ""
    problem = crowded(config, plan, os.cpu_count() or 1)
    return f"on this machine alone it would not start: {problem}\n" if problem else ""


def _say(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; the check itself goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nodes_of(address: str) -> list[NodeResources]:
    import ray

    from .cluster import join
    from .pools import cluster_nodes

    join(address)
    try:
        return cluster_nodes()
    finally:
        ray.shutdown()
