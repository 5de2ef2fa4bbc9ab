"""A cluster of several nodes: room that is missing, crews that follow the nodes, a shared GPU.

The workers only sleep, so that the nodes of a test may have GPUs that don't exist.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from rlgen.actors.placement import check_capacity, live_nodes
from rlgen.config import RunConfig, load_config
from rlgen.config.roles import Role
from rlgen.errors import PlacementError
from rlgen.jobs.bench_orchestration import SleepingRuntime, running
from rlgen.jobs.bench_workers import StageTimes, tokens_of
from rlgen.learner.batch import learner_batch, pooled
from rlgen.sampling.units import training_units
from tests.clusters import FAST_DEATHS, NODE_STORE_BYTES, cluster_of

pytestmark = pytest.mark.ray

NUM_UNITS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """2 CPUs and a GPU on demand, 2 CPUs on the spot market."""
    head = {
        "num_cpus": 2,
        "num_gpus": 1,
        "labels": {"market": "on-demand"},
        "_system_config": FAST_DEATHS,
    }
    with cluster_of(head) as cluster:
        add_node(cluster, num_cpus=2, market="spot")
        cluster.wait_for_nodes()
        yield cluster


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def add_node(cluster: Cluster, *, num_cpus: int, **labels: str) -> Any:
    return cluster.add_node(num_cpus=num_cpus, labels=labels, object_store_memory=NODE_STORE_BYTES)


def wait_for(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# -- room --------------------------------------------------------------------------------------


def role(name: str, count: int, cpus: float, gpus: float = 0.0, **labels: str) -> Role:
    return Role(name, count, 1, cpus, gpus, labels)


def test_what_finds_no_node_is_named_with_what_every_node_has(driver: None) -> None:
    wanted = [role("rollout", 5, 1, market="spot"), role("learner", 1, 1, 2)]
    with pytest.raises(PlacementError) as raised:
        check_capacity(wanted, timeout_s=2)
    message = str(raised.value)
    assert (
        "no room for 3 of 5 rollout processes with 1 CPU and 0 GPU each on a node with " in message
    )
    assert "market=spot and a learner process with 1 CPU and 2 GPU, after 2 s" in message
    assert "(2 of 2 CPU free, 1 of 1 GPU free, market=on-demand)" in message
    assert "(2 of 2 CPU free, 0 of 0 GPU free, market=spot)" in message
    assert "Add nodes, or lower the num_workers" in message


def test_room_that_others_use_is_told_apart_and_waited_for(driver: None) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        def ready(self) -> None:
            pass

    other = Other.options(label_selector={"market": "spot"}).remote()
    ray.get(other.ready.remote())
    wait_for(
        lambda: any(n.free.get("CPU", 0.0) < 2 for n in live_nodes()), "it is seen a little later"
    )
    wanted = [role("rollout", 3, 1)]
    with pytest.raises(PlacementError, match=r"1 of 3 rollout .*Others use what is missing: wait"):
        check_capacity(wanted, timeout_s=1)
    ray.kill(other)
    started = time.monotonic()
    check_capacity(wanted, timeout_s=60)
    assert time.monotonic() - started < 30, "the wait ends before its time"


def test_a_node_that_joins_ends_the_wait(cluster: Cluster, driver: None) -> None:
    wanted = [role("rollout", 1, 1, market="reserved")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(check_capacity, wanted, timeout_s=40)
        time.sleep(1.0)
        assert not waiting.done()
        late = add_node(cluster, num_cpus=1, market="reserved")
        waiting.result()
    cluster.remove_node(late)


# -- runs --------------------------------------------------------------------------------------


def config_of(*words: str) -> RunConfig:
    return load_config(
        None,
        [
            f"rollout.conditions_per_step={NUM_UNITS}",
            "rollout.conditions_per_unit=1",
            "rollout.num_workers=1",
            *(f"{role}.num_cpus=0.1" for role in ("rollout", "reward", "learner")),
            *words,
        ],
    )


def submit(config: RunConfig, runtime: SleepingRuntime, step: int) -> None:
    runtime.submit(training_units(config, step, policy_version=step))


def finish(config: RunConfig, runtime: SleepingRuntime, step: int) -> None:
    """Collect a step, hold it against what it must be, and learn from it."""
    scored = runtime.collect(training_units(config, step, policy_version=step))
    assert [item.rollout.unit.index for item in scored] == list(range(NUM_UNITS))
    for item in scored:
        np.testing.assert_array_equal(item.rollout.tokens_BL, tokens_of(item.rollout.unit))
    rewards = runtime.commit_moments(step, *pooled(scored))
    runtime.learn(learner_batch(step, scored, rewards))


def test_all_roles_share_one_gpu(cluster: Cluster) -> None:
    shares = ("rollout.num_gpus=0.4", "reward.num_gpus=0.2", "learner.num_gpus=0.4")
    config = config_of(*shares)
    with running(config, StageTimes(0.0, 0.0, 0.0)) as runtime:
        submit(config, runtime, 0)
        finish(config, runtime, 0)
        assert len(runtime.pulses("")) == 3
        nodes = {pulse.node_id for pulse in runtime.pulses("")}
        assert nodes == {ray.get_runtime_context().get_node_id()}, "that of the only GPU"
        wait_for(lambda: ray.available_resources().get("GPU", 0.0) < 1e-6, "it is divided up")


def test_workers_join_and_leave_with_spot_nodes_and_the_result_stays(cluster: Cluster) -> None:
    config = config_of(
        "rollout.num_workers=3",
        "rollout.min_workers=1",
        "rollout.num_cpus=2",
        "rollout.label_selector={market: spot}",
        "reward.label_selector={market: '!spot'}",
        "learner.label_selector={market: on-demand}",
    )
    with running(config, StageTimes(0.5, 0.0, 0.0)) as runtime:
        [first] = runtime.pulses("rollout-")
        others = runtime.pulses("learner-") + runtime.pulses("reward-")
        assert {p.node_id for p in others} == {ray.get_runtime_context().get_node_id()}
        assert first.node_id not in {p.node_id for p in others}
        submit(config, runtime, 0)
        finish(config, runtime, 0)

        joined = add_node(cluster, num_cpus=4, market="spot")
        wait_for(lambda: len(runtime.pulses("rollout-")) == 3, "two workers join")
        newcomers = {p.worker for p in runtime.pulses("rollout-")} - {first.worker}

        submit(config, runtime, 1)
        wait_for(lambda: all(n in runtime.whereabouts() for n in newcomers), "they get units")
        cluster.remove_node(joined, allow_graceful=False)
        finish(config, runtime, 1)
        wait_for(lambda: runtime.health().restarts["rollout"] >= 2, "two are lost")
        # More, if one in their place was still sent to the node that was gone.
        assert runtime.health().restarts["rollout"] <= 4
        assert [p.worker for p in runtime.pulses("rollout-")] == [first.worker]

        submit(config, runtime, 2)
        finish(config, runtime, 2)
        groups = runtime.health().groups
        assert (groups.generated, groups.taken, groups.in_flight) == (18, 18, 0)
        assert not groups.dropped
