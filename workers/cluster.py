"""Attaching to a Ray cluster, or starting one of our own."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlxf.core.errors import PlacementError
from rlxf.placement.plan import Plan
from rlxf.platform import Platform

from .address import running_cluster

log = logging.getLogger(__name__)

ROOM_BYTES = 64 * 2**20  # of logs and sockets of a short run
DASHBOARD_S = 3.0  # longest wait for the dashboard
LOOPBACK = ("127.", "localhost", "::1")
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster that this process is connected to."""

    address: str | None  # None: our own, which ends with this process
    logs: str  # folder of the workers' logs on this machine

    def disconnect(self) -> None:
        """Kill this run's workers and give their devices back; a cluster of our own ends."""
        ray.shutdown()


def connect(plan: Plan, platform: Platform) -> Cluster:
    """Attach to ``RAY_ADDRESS`` or to the cluster that ``ray start`` began on this machine; else start a local one.

    Raises:
        PlacementError: the cluster does not answer, or does not let this program in.
    """
    address = running_cluster()
    if address is None:
        require_room(Path(os.environ.get("RAY_TMPDIR") or "/tmp"))  # Ray's own default
        _prepare_environment()
        own = _own_resources(plan, platform)
        context = ray.init(address="local", include_dashboard=False, **own, **QUIET)
    else:
        context = join(address)
        # The address that other machines use.
        _warn_if_open(ray.get_runtime_context().gcs_address, context.dashboard_url)
        require_room(Path(context.address_info["session_dir"]))
    return Cluster(address, logs=os.path.join(context.address_info["session_dir"], "logs"))


def require_room(folder: Path) -> None:
    """Refuse a folder in which Ray could not keep its sockets and logs: its processes would hang or die without a word.

    Raises:
        PlacementError: the folder is full, or cannot be written.
    """
    advice = "make room, or name another folder: RAY_TMPDIR; of a cluster of your own, ray start --temp-dir"
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PlacementError(f"Ray's temporary folder {folder}: {error.strerror}; {advice}") from error
    if free < ROOM_BYTES:
        raise PlacementError(
            f"Ray's temporary folder {folder}: {free:,} bytes are free, and Ray needs about {ROOM_BYTES:,}; {advice}"
        )


def join(address: str) -> Any:
    """Connect this process to a running cluster; Ray's description of it.

    Raises:
        PlacementError: the address is none, or the cluster does not let this program in.
    """
    if "://" in address:
        raise PlacementError(f"RAY_ADDRESS = {address}: expected host:port of the head node, auto or local")
    _prepare_environment()
    try:
        return ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlacementError(
            f"the Ray cluster at {address} refused the connection: {' '.join(str(error).split())[:300]}. Check that "
            "the token is the cluster's (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH), and that Ray's version is the same"
        ) from error


def _prepare_environment() -> None:
    # Ray would start a worker per core beforehand; ours have an environment of their own, and never use those.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray's 15 would leave the workers a thirtieth of a core beside any other busy process: they would seem to hang.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new behaviour, without its warning
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that a failed wait no longer asks for


def _own_resources(plan: Plan, platform: Platform) -> dict[str, Any]:
    """On a CPU machine: as many logical devices as the pools ask for. Elsewhere Ray counts the devices itself."""
    if platform.ray_resource != "CPU":
        return {}
    cores = os.cpu_count() or 1
    log.info(
        "no Ray cluster found: starting one on this machine with %d logical %s for %d cores, as resource_pool asks",
        plan.num_devices,
        plan.resource,
        cores,
    )
    if plan.resource == "CPU":
        return {"num_cpus": plan.num_devices}
    return {"num_cpus": cores, "resources": {plan.resource: plan.num_devices}}


def _warn_if_open(address: str, dashboard: str | None) -> None:
    """Whoever reaches an open cluster can run commands on it: warn."""
    if address.startswith(LOOPBACK) or not _is_open(dashboard):
        return
    log.warning("Ray at %s has no token: anybody who can reach it can run commands there.", address)
    log.warning("Protect it: export RAY_AUTH_MODE=token before `ray start` on every node, with one shared token file,")
    log.warning("and keep the dashboard on 127.0.0.1; scripts/cluster_up.sh does both.")


def _is_open(dashboard: str | None) -> bool:
    """Whether the dashboard answers without a token; without a dashboard, whether this process needed none."""
    if not dashboard:
        return os.environ.get("RAY_AUTH_MODE") != "token"
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/version", timeout=DASHBOARD_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except OSError:
        return os.environ.get("RAY_AUTH_MODE") != "token"
