"""Runs share a cluster: neither sees the other, and a run leaves nothing there, however it ends."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from ray.util.state import list_actors

from tests.chaos.victims import (
    await_that,
    check_as_undisturbed,
    finish,
    running,
    steps_done,
    summary_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "object_store_memory": 400 * 2**20},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def living_actors() -> list[Any]:
    return [
        actor
        for state in ("ALIVE", "PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING")
        for actor in list_actors(filters=[("state", "=", state)], limit=1000)
    ]


def nothing_is_left() -> bool:
    """No actor, no placement group, every resource free, the object store's memory too."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return (
        not living_actors() and not groups and ray.available_resources() == ray.cluster_resources()
    )


def test_two_runs_share_a_cluster_and_leave_nothing(
    undisturbed: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    with (
        running(one, RAY_ADDRESS=cluster.address) as first,
        running(other, "seed=1", RAY_ADDRESS=cluster.address) as second,
    ):
        await_that(lambda: steps_done(one) >= 1 and steps_done(other) >= 1, "step of both")
        names = [actor.name for actor in living_actors() if actor.name]
        stores = [name for name in names if name.endswith("-moments")]
        assert len(stores) == len(set(stores)) == 2
        psutil.Process(second.pid).send_signal(signal.SIGKILL)
        finish(first)
    check_as_undisturbed(summary_of(one), undisturbed)
    await_that(nothing_is_left, "cluster as it was")
