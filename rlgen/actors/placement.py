"""Where the roles can run: finding or starting Ray, and what to say if it is too small.

Owns the connection and the feasibility check.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlgen.config.plan import Role
from rlgen.config.run import RunConfig
from rlgen.errors import PlacementError

_CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` on this machine notes its address."""
_OBJECT_STORE_BYTES = 512 * 2**20


def connect(config: RunConfig) -> str:
    """Connect to the cluster that is configured or found, or start Ray here.

    Returns:
        the dashboard's address, or an empty string.
    Raises:
        PlacementError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    options: dict[str, Any] = {
        "namespace": config.cluster.namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    address = _find_cluster(config.cluster.address)
    if address is not None:
        try:
            if re.fullmatch(r"[\w.-]+:\d+", address) and not _listens(address):
                raise ConnectionError("nothing listens there")
            context = ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlacementError(
                f"there is no Ray to connect to at {address} ({error}); check RAY_ADDRESS and "
                "cluster.address, and RAY_AUTH_TOKEN if the cluster asks for tokens."
            ) from error
    else:
        context = ray.init(
            address="local",
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=True,
            **options,
        )
    return context.dashboard_url or ""


def check_capacity(roles: Sequence[Role], *, timeout_s: float) -> None:
    """Wait until all roles fit on the cluster's nodes together, at most for a while.

    Raises:
        PlacementError: names the role that finds no node, and what the nodes have.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        unmet = first_unmet_role(roles, nodes)
        if unmet is None:
            return
        if time.monotonic() > deadline:
            have = "; ".join(
                f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes
            )
            raise PlacementError(
                f"the cluster has no room for {unmet}. Its nodes have: {have}. Add nodes, or "
                "lower the num_workers, num_cpus or num_gpus of a role."
            )
        time.sleep(0.5)


def first_unmet_role(roles: Sequence[Role], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Name the first role that first-fit, largest first, finds no node for.

    Args:
        roles: what the run asks for.
        nodes: resources of each node.
    """
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    requests = [role for role in roles for _ in range(role.count)]
    for role in sorted(requests, key=lambda r: (r.num_gpus, r.num_cpus), reverse=True):
        fitting = [node for node in free if node[0] >= role.num_cpus and node[1] >= role.num_gpus]
        if not fitting:
            return f"a {role.name} process with {role.num_cpus:g} CPU and {role.num_gpus:g} GPU"
        fitting[0][0] -= role.num_cpus
        fitting[0][1] -= role.num_gpus
    return None


def _find_cluster(configured: str) -> str | None:
    """RAY_ADDRESS, the configured address, or a live cluster that `ray start` made here."""
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    if configured != "auto":
        return configured
    try:
        address = _CURRENT_CLUSTER.read_text().strip()
    except OSError:
        return None
    return address if _listens(address) else None


def _listens(address: str) -> bool:
    """Whether something accepts connections at host:port; Ray itself would wait a minute."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5.0):
            return True
    except (OSError, ValueError):
        return False
