"""A placement plan before anything runs: ``dry_run=true`` prints it, a plan that this machine cannot hold is refused.

Neither torch nor Ray is imported, unless a dry run finds a cluster, or plans for a CPU, which is measured.
"""

from __future__ import annotations

import os
import sys

from rlxf.assembly.planning import Recipe, for_its_device, plan_costs, plan_layouts, require_memory
from rlxf.config.devices import device_facts
from rlxf.config.schema import RunConfig
from rlxf.core.errors import PlacementError
from rlxf.placement.plan import NodeResources, Plan, crowded, fit, make_plan
from rlxf.placement.text import describe, describe_crossing, describe_nodes

from .address import running_cluster


def dry_run(config: RunConfig, recipe: Recipe | None = None) -> None:
    """Print the plan to stdout: roles, memory, time, the cluster, and the layouts that ``plan.devices`` asks for.

    Raises:
        ConfigError: a key of ``plan`` names something that does not exist.
        PlacementError: the running cluster cannot hold it.
        OutOfMemoryPlan: by estimate a device has too little memory for its roles.
    """
    address = None if config.runtime == "local" else running_cluster()
    if address is None:
        config = for_its_device(config)
    plan = make_plan(config)
    _say(describe(config, plan))
    problem = _crowded_here(config, plan) if address is None and config.runtime == "ray" else None
    # Where this CPU has far too few cores the plan may be meant for other CPUs, which cannot be measured here.
    costs = plan_costs(config, _say, color=sys.stdout.isatty()) if problem is None else None
    nodes = _cluster(config, plan, address, problem)
    if config.plan.devices is not None:
        sizes = [int(node.total.get(plan.resource, 0)) for node in nodes]
        plan_layouts(config, sizes, recipe or Recipe(), _say)
    elif costs is not None:
        require_memory(config, costs)


def _cluster(config: RunConfig, plan: Plan, address: str | None, problem: str | None) -> list[NodeResources]:
    """Print what the running cluster has; its nodes."""
    if config.runtime == "local":
        return []
    if address is None:
        _say("\ncluster: none is running here\n")
        # The plan may be meant for other machines, so it is no error.
        _say(f"on this machine alone it would not start: {problem}\n" if problem else "")
        return []
    nodes = _nodes_of(address)
    _say(f"\ncluster: {address}\n{describe_nodes(plan, nodes)}")
    problems = fit(plan, nodes)
    if problems and config.plan.devices is None:
        raise PlacementError("\n".join(problems))
    _say("\n".join([*problems, ""]) if problems else f"it has room for this recipe\n{describe_crossing(plan, nodes)}")
    return nodes


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
