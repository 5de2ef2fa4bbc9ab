"""Clusters of several nodes on this machine, for tests."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

_ANNOUNCEMENT = Path("/tmp/ray/ray_current_cluster")
NODE_STORE_BYTES = 100 << 20
"""Object store of each node; by default each takes a share of the whole machine."""
FAST_DEATHS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""Settings by which a dead node is found within seconds."""


@contextmanager
def cluster_of(head: Mapping[str, Any]) -> Iterator[Cluster]:
    """A cluster that jobs of this process connect to, and nobody else's.

    Args:
        head: arguments of the head node, as `Cluster.add_node` takes them.
    """
    defaults = {"include_dashboard": False, "object_store_memory": NODE_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**defaults, **head})
    _ANNOUNCEMENT.unlink(missing_ok=True)  # another job on this machine would come and take room
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
    finally:
        cluster.shutdown()
