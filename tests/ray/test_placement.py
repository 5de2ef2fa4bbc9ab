"""Room on a cluster of several nodes: what fits is taken, what doesn't is told."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster

from rlgen.actors.placement import check_capacity, live_nodes
from rlgen.config.roles import Role
from rlgen.errors import PlacementError

pytestmark = pytest.mark.ray

SPOT = {"market": "spot"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """2 CPUs without labels, and 2 CPUs and a GPU that does not exist on a spot node."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    cluster.add_node(num_cpus=2, num_gpus=1, labels=SPOT, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def role(name: str, count: int, cpus: float, gpus: float = 0.0, **labels: str) -> Role:
    return Role(name, count, 1, cpus, gpus, labels)


def test_the_nodes_are_seen_with_what_is_free_and_their_labels(cluster: Cluster) -> None:
    sizes = {(n.total.get("CPU"), n.total.get("GPU", 0.0)) for n in live_nodes()}
    assert sizes == {(2.0, 0.0), (2.0, 1.0)}
    assert sorted(n.labels.get("market", "") for n in live_nodes()) == ["", "spot"]
    assert all(n.free.get("CPU") == 2.0 for n in live_nodes())


def test_roles_that_share_the_only_gpu_fit(cluster: Cluster) -> None:
    started = time.monotonic()
    check_capacity(
        [
            role("rollout", 1, 0.25, 0.4, market="spot"),
            role("reward", 1, 0.25, 0.2),
            role("moment store", 1, 0.25),
            role("learner", 1, 0.25, 0.4),
        ],
        timeout_s=20,
    )
    assert time.monotonic() - started < 10, "it is found at once, not at the deadline"


def test_what_finds_no_node_is_named_with_what_every_node_has(cluster: Cluster) -> None:
    wanted = [role("rollout", 5, 1, market="spot"), role("learner", 1, 1, 2)]
    with pytest.raises(PlacementError) as raised:
        check_capacity(wanted, timeout_s=2)
    message = str(raised.value)
    assert (
        "no room for 3 of 5 rollout processes with 1 CPU and 0 GPU each on a node with " in message
    )
    assert "market=spot and a learner process with 1 CPU and 2 GPU, after 2 s" in message
    assert "(2 of 2 CPU free, 0 of 0 GPU free, market=)" in message
    assert "(2 of 2 CPU free, 1 of 1 GPU free, market=spot)" in message
    assert "Add nodes, or lower the num_workers" in message


def test_room_that_others_use_is_told_apart_and_waited_for(cluster: Cluster) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        def ready(self) -> None:
            pass

    other = Other.options(label_selector=SPOT).remote()
    ray.get(other.ready.remote())
    deadline = time.monotonic() + 10
    while all(n.free.get("CPU") == 2.0 for n in live_nodes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # nodes report what is free a little later
    wanted = [role("rollout", 3, 1)]
    with pytest.raises(PlacementError, match=r"1 of 3 rollout .*Others use what is missing: wait"):
        check_capacity(wanted, timeout_s=1)
    ray.kill(other)
    check_capacity(wanted, timeout_s=20)


def test_a_node_that_joins_ends_the_wait(cluster: Cluster) -> None:
    wanted = [role("rollout", 1, 1, market="reserved")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(check_capacity, wanted, timeout_s=40)
        time.sleep(1.0)
        assert not waiting.done()
        labels = {"market": "reserved"}
        cluster.add_node(num_cpus=1, labels=labels, object_store_memory=100 << 20)
        waiting.result()
