"""The moment store's process dies before, during and after commits; no number changes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from rlgen.actors.moment_client import MomentStoreClient
from rlgen.errors import RewardError, RoleLost
from rlgen.rewards.moment_store import MomentStore
from rlgen.types import StepRewards
from tests.unit.test_moment_store import (
    NUM_IMAGES,
    assert_same_answer,
    config_of,
    draw,
    reference,  # noqa: F401  (a fixture)
    started,
    state_bytes,
    step_rewards,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class MortalStore(MomentStore):
    """A store that can be asked for its process, and that takes its time over a commit."""

    def commit(self, step: int, rewards: Any, features_BF: Any) -> Any:
        answer = super().commit(step, rewards, features_BF)
        time.sleep(0.3)
        return answer

    def pid(self) -> int:
        return os.getpid()


def wait(answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=60)
    except RayTaskError as error:
        raise error.cause from None


@pytest.fixture
def make(reference: str) -> Callable[[int], Any]:  # noqa: F811
    config = config_of(reference)
    return lambda _: ray.remote(MortalStore).options(num_cpus=0).remote(config)


def kill(client: MomentStoreClient) -> None:
    os.kill(ray.get(client._actor.pid.remote()), signal.SIGKILL)


def commit(store: Any, step: int) -> StepRewards:
    return store.commit(step, step_rewards(step), draw(NUM_IMAGES, seed=10 + step))


def test_no_death_changes_a_reward_or_the_state(make: Callable[[int], Any], reference: str) -> None:  # noqa: F811
    expected = started(config_of(reference))
    client = MomentStoreClient(make, wait=wait, max_restarts=3)
    client.await_ready()
    client.bootstrap(draw(50, seed=1) + 0.5)

    kill(client)  # before
    assert_same_answer(commit(client, 0), commit(expected, 0))
    assert client.restarts == 1

    pid = ray.get(client._actor.pid.remote())
    threading.Timer(0.15, lambda: os.kill(pid, signal.SIGKILL)).start()  # during
    assert_same_answer(commit(client, 1), commit(expected, 1))
    assert client.restarts == 2

    kill(client)  # after: the same commit again, because the answer got lost
    assert_same_answer(commit(client, 1), commit(expected, 1))
    kill(client)
    assert_same_answer(commit(client, 2), commit(expected, 2))
    assert client.restarts == 4
    assert client.recovery_s is not None and client.recovery_s < 15

    from rlgen.learner.state_io import dump_state

    assert dump_state(client.state_dict()) == state_bytes(expected)


def test_the_journal_is_cut_where_the_state_is_read(
    make: Callable[[int], Any],
    reference: str,  # noqa: F811
) -> None:
    expected = started(config_of(reference))
    client = MomentStoreClient(make, wait=wait, max_restarts=3)
    client.await_ready()
    client.bootstrap(draw(50, seed=1) + 0.5)
    commit(client, 0), commit(expected, 0)
    client.state_dict()
    assert client._journal == []
    kill(client)
    assert_same_answer(commit(client, 1), commit(expected, 1))


def test_a_reset_store_starts_over(make: Callable[[int], Any], reference: str) -> None:  # noqa: F811
    client = MomentStoreClient(make, wait=wait, max_restarts=3)
    client.await_ready()
    answers = []
    for _ in range(2):
        client.bootstrap(draw(50, seed=1) + 0.5)
        answers.append(commit(client, 0))
        client.reset()
    assert_same_answer(*answers)


def test_a_commit_that_is_refused_is_not_repeated_after_a_death(make: Callable[[int], Any]) -> None:
    client = MomentStoreClient(make, wait=wait, max_restarts=3)
    client.await_ready()
    client.bootstrap(draw(50, seed=1) + 0.5)
    with pytest.raises(RewardError, match="step 5 was committed but step 0 is next"):
        commit(client, 5)
    kill(client)
    assert np.isfinite(commit(client, 0).advantages_B).all()


def test_a_store_that_can_not_live_ends_the_run(tmp_path: Path) -> None:
    class StillBorn:
        def __init__(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def state_dict(self) -> dict[str, Any]:
            return {}

    client = MomentStoreClient(
        lambda _: ray.remote(StillBorn).options(num_cpus=0).remote(), wait=wait, max_restarts=1
    )
    with pytest.raises(RoleLost, match="died 2 times in one call"):
        client.await_ready()
