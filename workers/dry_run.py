"""A placement plan before anything runs: ``dry_run=true`` prints it, a plan that this machine cannot hold is refused.

Neither torch nor Ray is imported, unless a dry run finds a cluster.
"""

from __future__ import annotations

import os
import sys

from rlxf.config.devices import device_facts
from rlxf.config.schema import RunConfig
from rlxf.core.errors import PlacementError
from rlxf.placement.plan import NodeResources, Plan, crowded, fit, make_plan
from rlxf.placement.text import describe, describe_crossing, describe_nodes

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
        problem = _crowded_here(config, plan)  # the plan may be meant for other machines, so it is no error
        _say(f"on this machine alone it would not start: {problem}\n" if problem else "")
        return
    nodes = _nodes_of(address)
    _say(f"\ncluster: {address}\n{describe_nodes(plan, nodes)}")
    problems = fit(plan, nodes)
    if problems:
        raise PlacementError("\n".join(problems))
    _say(f"it has room for this recipe\n{describe_crossing(plan, nodes)}")


def require_cores(config: RunConfig) -> None:
    """Refuse a recipe with far more processes than cores, where a run would start a Ray of its own on CPUs.

    Raises:
        PlacementError: too many processes; or ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    problem = _crowded_here(config, make_plan(config)) if running_cluster() is None else None
    if problem is not None:
        raise PlacementError(problem)


def _crowded_here(config: RunConfig, plan: Plan) -> str | None:
    """Why a run with a Ray of its own would not start on this machine; None if it would."""
    if device_facts(config.training.device).ray_resource != "CPU":
        return None
    return crowded(config.resource_pool, plan, os.cpu_count() or 1)


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
