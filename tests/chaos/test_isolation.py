"""Runs share a cluster: neither sees the other, and a run leaves nothing there, however it ends."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from tests.chaos.victims import (
    await_that,
    check_as_undisturbed,
    finish,
    running,
    steps_done,
    summary_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


_RAYS_OWN = "AutoscalingCoordinator"
"""Ray Train starts it once for a cluster, detached; it needs no resources."""


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


def living_actors() -> list[dict[str, Any]]:
    """Straight from the cluster: the state API may ask another Ray of this machine."""
    alive = [actor for actor in ray.state.actors().values() if actor["State"] != "DEAD"]
    return [actor for actor in alive if actor["Name"] != _RAYS_OWN]


def leftovers() -> list[Any]:
    """Actors, placement groups, and resources that are not free, the object store's among them."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    free, total = ray.available_resources(), ray.cluster_resources()
    used = [(name, total[name] - free.get(name, 0.0)) for name in total]
    return [*living_actors(), *groups, *((name, amount) for name, amount in used if amount > 1e-6)]


def test_two_runs_share_a_cluster_and_leave_nothing(
    undisturbed: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    with (
        running(one, RAY_ADDRESS=cluster.address) as first,
        running(other, "seed=1", RAY_ADDRESS=cluster.address) as second,
    ):
        await_that(lambda: steps_done(one) >= 1 and steps_done(other) >= 1, "step of both")
        names = [actor["Name"] for actor in living_actors()]
        stores = [name for name in names if name.endswith("-moments")]
        assert len(stores) == len(set(stores)) == 2
        psutil.Process(second.pid).send_signal(signal.SIGKILL)
        finish(first)
    check_as_undisturbed(summary_of(one), undisturbed)
    with suppress(AssertionError):
        await_that(lambda: not leftovers(), "clean cluster", deadline_s=60)
    assert leftovers() == []
