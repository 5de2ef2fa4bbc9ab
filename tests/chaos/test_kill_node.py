"""Every process of a node, its raylet too, dies at once; later a node joins and gets work."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.chaos.victims import (
    await_that,
    check_as_undisturbed,
    finish,
    processes,
    running,
    steps_done,
    summary_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORE_BYTES = 200 * 2**20
FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that hosts no role; roles need CPUs, and only other nodes have any."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": FAST_HEALTH_CHECKS,
        },
    )
    yield cluster
    cluster.shutdown()


def raylet_of(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def test_a_node_dies_and_another_joins(
    undisturbed: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    output = tmp_path / "run"
    settings = ["rollout.num_cpus=1", "cluster.start_timeout_s=240"]
    with running(output, *settings, RAY_ADDRESS=cluster.address) as job:
        await_that(lambda: steps_done(output) >= 4, "step 4")
        time.sleep(random.random() * 0.5)
        raylet = raylet_of(first)
        for process in [raylet, *raylet.children(recursive=True)]:
            os.kill(process.pid, signal.SIGKILL)
        second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        at_work = await_that(
            lambda: any(processes(role, raylet_of(second)) for role in ("rollout", "reward")),
            "worker on the node that joined",
        )
        assert at_work
        finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, undisturbed)
    assert sum(found["restarts"].values()) >= 1
