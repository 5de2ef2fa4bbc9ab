"""Workers that die are replaced, and their units come out the same."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.util.state import list_actors

from rlgen.actors.ray_runtime import RayRuntime
from rlgen.config import RunConfig, load_config
from rlgen.digits.assets import ensure_assets, resolve_embedded
from rlgen.errors import RoleLost
from rlgen.learner.runtime import LocalRuntime
from rlgen.sampling.units import training_units
from tests.conftest import TINY_RUN

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(cache_folder: Path) -> RunConfig:
    config = load_config(None, [*TINY_RUN, "rollout.conditions_per_step=200"])
    return resolve_embedded(config, ensure_assets(config.digits, lambda *_: None))


@pytest.fixture(scope="module")
def runtime(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayRuntime]:
    runtime = RayRuntime(config, storage=str(tmp_path_factory.mktemp("ray")))
    runtime.start(config)
    yield runtime
    runtime.close()


def kill_one(class_name: str) -> None:
    """SIGKILL a live actor process of this class."""
    alive = list_actors(filters=[("class_name", "=", class_name), ("state", "=", "ALIVE")])
    os.kill(alive[0].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("step", "class_name", "role"), [(0, "RolloutWorker", "rollout"), (1, "RewardWorker", "reward")]
)
def test_a_killed_worker_changes_no_result(
    config: RunConfig, runtime: RayRuntime, step: int, class_name: str, role: str
) -> None:
    units = training_units(config, step, policy_version=0)
    local = LocalRuntime(config)
    local.submit(units)
    expected = local.collect(units)

    runtime.submit(units)
    kill_one(class_name)
    found = runtime.collect(units)

    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_array_equal(ours.rollout.tokens_BL, theirs.rollout.tokens_BL)
        np.testing.assert_array_equal(ours.rewards["clip"], theirs.rewards["clip"])
    deadline = time.monotonic() + 30
    while runtime.health().restarts[role] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert runtime.health().restarts[role] == 1


def test_the_moment_store_is_found_by_name(runtime: RayRuntime) -> None:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert any(name.endswith("-moments") for name in names)


def test_restarts_are_counted_on_when_everything_is_made_anew(
    config: RunConfig, runtime: RayRuntime
) -> None:
    kill_one("MomentStoreActor")
    before = runtime.moment_state()
    kill_one("Coordinator")
    with pytest.raises(RoleLost, match="the coordinator died"):
        while True:
            runtime.health()
    runtime.start(config)
    restarts = {"rollout": 1, "reward": 1, "moment_store": 1, "learner": 1}
    assert runtime.health().restarts == restarts
    runtime.restore_moments(before)
    kill_one("MomentStoreActor")
    assert runtime.moment_state().keys() == before.keys()
    assert runtime.health().restarts == restarts | {"moment_store": 2}
