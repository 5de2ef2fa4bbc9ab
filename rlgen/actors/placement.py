"""Where the roles can run: finding or starting Ray, and what to say if it is too small.

Owns the connection and the feasibility check.
"""

import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from rlgen.config.learning import LearnerConfig
from rlgen.config.reward import RewardConfig
from rlgen.config.roles import Node, Role, unmet_roles
from rlgen.config.run import RolloutConfig, RunConfig
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
    address = find_cluster(config.cluster.address)
    if address is not None:
        try:
            if re.fullmatch(r"[\w.-]+:\d+", address) and not _listens(address):
                raise ConnectionError("nothing listens there")
            context = ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
            raise PlacementError(
                f"there is no Ray to connect to at {address} ({error}); check RAY_ADDRESS and "
                "cluster.address, and RAY_AUTH_TOKEN if the cluster asks for tokens."
            ) from error
    else:
        context = ray.init(
            address="local",
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=config.cluster.dashboard,
            **options,
        )
    return context.dashboard_url or ""


def check_capacity(
    roles: Sequence[Role],
    *,
    timeout_s: float,
    advice: str = "lower the num_workers, num_cpus or num_gpus of a role; "
    "cluster.placement_timeout_s waits longer",
) -> None:
    """Wait until Ray finds room for all roles together, at most for a while.

    What is asked for is visible to an autoscaler meanwhile. It is given back before anyone uses
    it, so whoever comes at the same moment may still be faster.

    Args:
        roles: what must fit.
        timeout_s: longest wait, in seconds.
        advice: what to do if they don't fit, other than adding nodes.
    Raises:
        PlacementError: names the roles that find no node, and what every node has.
    """
    processes = [role for role in roles for _ in range(role.count) if role.resources]
    if not processes:
        return
    request = placement_group(
        [role.resources for role in processes],
        bundle_label_selector=[dict(role.label_selector) for role in processes],
    )
    try:
        if not request.wait(timeout_s):
            raise PlacementError(explain_unmet(roles, live_nodes(), timeout_s, advice))
    finally:
        remove_placement_group(request)


def role_options(role: RolloutConfig | RewardConfig | LearnerConfig) -> dict[str, Any]:
    """Options of a Ray actor of this role."""
    return {
        "num_cpus": role.num_cpus,
        "num_gpus": role.num_gpus,
        "label_selector": dict(role.label_selector) or None,
    }


def live_nodes() -> list[Node]:
    """The nodes of the cluster, and what is free on each of them."""
    free = ray.state.available_resources_per_node()
    return [
        Node(
            name=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], node["Resources"]),  # a new node has not reported
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def explain_unmet(
    roles: Sequence[Role], nodes: Sequence[Node], timeout_s: float, advice: str
) -> str:
    """What of the roles finds no node, and what the nodes have."""
    unmet = unmet_roles(roles, nodes)
    is_busy = bool(unmet) and not unmet_roles(roles, nodes, busy=False)
    labels = sorted({label for role in roles for label in role.label_selector})
    has = "; ".join(node.describe(labels) for node in nodes)
    way_out = "Others use what is missing: wait, add nodes" if is_busy else "Add nodes"
    return (
        f"the cluster has no room for {' and '.join(map(str, unmet)) or 'all roles together'}, "
        f"after {timeout_s:g} s. Its nodes: {has}. {way_out}, or {advice}."
    )


def find_cluster(configured: str) -> str | None:
    """RAY_ADDRESS, the configured address, or a live cluster that `ray start` made here."""
    named = os.environ.get("RAY_ADDRESS") or configured
    if named != "auto":
        return None if named == "local" else named
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
