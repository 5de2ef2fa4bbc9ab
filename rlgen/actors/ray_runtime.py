"""The roles of a run as Ray actors; the arithmetic is the same as in LocalRuntime.

Owns every long-lived actor: all are made here, in the driver, so that none dies with another.
The driver waits at the coordinator, with a deadline on every wait.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlgen.actors.coordinator import Coordinator, LearnerCommand
from rlgen.actors.learner_group import LearnerGroup
from rlgen.actors.moment_store import MomentStoreActor
from rlgen.actors.placement import check_capacity, connect
from rlgen.actors.reward_worker import RewardWorker
from rlgen.actors.rollout_worker import RolloutWorker
from rlgen.actors.supervisor import Supervisor
from rlgen.actors.weight_store import WeightStore
from rlgen.config.plan import role_resources
from rlgen.config.run import RunConfig
from rlgen.errors import RlgenError
from rlgen.learner.batch import split_batch
from rlgen.learner.checkpoint import Part
from rlgen.types import LearnerBatch, ScoredRollout, StepRewards, WorkUnit

_PLACEMENT_TIMEOUT_S = 30.0
_GOODBYE_S = 10.0


class RayRuntime:
    """Places the roles and talks to them."""

    def __init__(self, config: RunConfig, *, storage: str, with_learner: bool = True) -> None:
        """Connect to Ray, or start it here; no actor yet.

        Args:
            config: the run.
            storage: folder or URL, seen by every node, for Ray Train's own bookkeeping.
            with_learner: False only samples and scores units of version 0, the policy as
                configured: no learner and no moment store then.
        Raises:
            PlacementError: the cluster has no room for a role.
        """
        self._config = config
        self._storage = storage
        self._with_learner = with_learner
        self._name = f"rlgen-{uuid.uuid4().hex[:8]}"
        self.dashboard_url = connect(config)
        self._supervisor: Supervisor | None = None
        self._learners: LearnerGroup | None = None
        try:
            roles = role_resources(config, with_learner=with_learner)
            check_capacity(roles, timeout_s=_PLACEMENT_TIMEOUT_S)
        except BaseException:
            ray.shutdown()
            raise

    def start(self, *, resume_from: str | None) -> None:
        """See Runtime; all roles come up side by side."""
        config = self._config
        self._coordinator = _actor(Coordinator, cpus=0).remote()
        self._weights = _actor(WeightStore, cpus=0).remote(config.max_policy_lag + 2)
        self._supervisor = Supervisor(self._coordinator, max_restarts=config.cluster.max_restarts)
        self._supervisor.hire("rollout", config.rollout.num_workers, self._make_rollout_worker)
        self._supervisor.hire("reward", config.reward.num_workers, self._make_reward_worker)
        if self._with_learner:
            self._start_learning(resume_from)
        self._supervisor.await_ready(config.cluster.start_timeout_s)
        if self._with_learner:
            timeout_s = config.cluster.start_timeout_s
            self._get(self._store.ready.remote(), "the moment store", timeout_s)
            # The first answer shows that the learners are up and have published their weights.
            self._command(LearnerCommand("digest"), timeout_s)

    def submit(self, units: Sequence[WorkUnit]) -> None:
        """See Runtime."""
        self._get(self._coordinator.submit.remote(list(units)), "the coordinator")

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        """See Runtime."""
        unit_ids = [unit.unit_id for unit in units]
        return self._get(
            self._coordinator.collect.remote(unit_ids), f"{len(unit_ids)} units of {unit_ids[0]}"
        )

    def bootstrap_moments(self, features_BF: np.ndarray) -> None:
        """See Runtime."""
        self._get(self._store.bootstrap.remote(features_BF), "the moment store")

    def commit_moments(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """See Runtime."""
        reference = self._store.commit.remote(step, dict(rewards), features_BF)
        return self._get(reference, "the moment store")

    def learn(self, batch: LearnerBatch) -> dict[str, float]:
        """See Runtime."""
        world_size = self._config.learner.num_workers
        batches = tuple(
            split_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)
        )
        return self._command(LearnerCommand("learn", batches))

    def save_learner(self, uri: str) -> list[Part]:
        """See Runtime."""
        return self._command(LearnerCommand("save", uri=uri))

    def moment_state(self) -> dict[str, Any]:
        """See Runtime."""
        return self._get(self._store.state_dict.remote(), "the moment store")

    def restore_moments(self, state: Mapping[str, Any]) -> None:
        """See Runtime."""
        self._get(self._store.load_state_dict.remote(dict(state)), "the moment store")

    def policy_sha256(self) -> str:
        """See Runtime."""
        return self._command(LearnerCommand("digest"))

    def restarts(self) -> dict[str, int]:
        """See Runtime."""
        counted = {} if self._supervisor is None else dict(self._supervisor.restarts)
        return counted | {"moment_store": 0, "learner": 0}

    def dropped_groups(self) -> dict[str, int]:
        """See Runtime."""
        dropped = self._get(self._coordinator.duplicate_groups.remote(), "the coordinator")
        return {"duplicate": dropped} if dropped else {}

    def close(self) -> None:
        """Send everyone home and disconnect."""
        if not ray.is_initialized():
            return
        if self._supervisor is not None:
            self._coordinator.close.remote()
            if self._learners is not None:
                self._learners.join(_GOODBYE_S)
            self._supervisor.close()
        ray.shutdown()

    def _start_learning(self, resume_from: str | None) -> None:
        """Make the moment store and the learners; they come up meanwhile."""
        self._store = _actor(
            MomentStoreActor, cpus=self._config.reward.num_cpus, name=f"{self._name}-moments"
        ).remote(self._config)
        self._learners = LearnerGroup(
            self._config,
            coordinator=self._coordinator,
            weights=self._weights,
            resume_from=resume_from,
            run_name=self._name,
            storage=self._storage,
        )

    def _make_rollout_worker(self, name: str) -> Any:
        rollout = self._config.rollout
        return _actor(RolloutWorker, cpus=rollout.num_cpus, gpus=rollout.num_gpus).remote(
            name, self._config, self._coordinator, self._weights
        )

    def _make_reward_worker(self, name: str) -> Any:
        reward = self._config.reward
        return _actor(RewardWorker, cpus=reward.num_cpus, gpus=reward.num_gpus).remote(
            name, self._config, self._coordinator
        )

    def _command(self, command: LearnerCommand, timeout_s: float | None = None) -> Any:
        number = self._get(self._coordinator.send.remote(command), "the coordinator")
        answer = self._coordinator.wait_answer.remote(number, self._config.learner.num_workers)
        return self._get(answer, f"the learners ({command.kind})", timeout_s)

    def _get(self, reference: Any, awaited: str, timeout_s: float | None = None) -> Any:
        """Wait with a deadline; errors come out as what they are."""
        limit = timeout_s or self._config.cluster.step_timeout_s
        try:
            return ray.get(reference, timeout=limit)
        except RayTaskError as error:
            if isinstance(error.cause, RlgenError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            where = ray.get(self._coordinator.describe.remote(), timeout=limit)
            raise RlgenError(
                f"no answer from {awaited} within {limit:g} s: {where}. See the actors in the Ray "
                "dashboard, or raise cluster.step_timeout_s if steps take that long."
            ) from None
        except RayActorError as error:
            raise RlgenError(
                f"the process behind {awaited} died ({error}); the last checkpoint is in place: "
                "start again with checkpoint.resume_from."
            ) from None


def _actor(shell: type, *, cpus: float, gpus: float = 0.0, name: str | None = None) -> Any:
    """A plain class as an actor class with its resources."""
    return ray.remote(shell).options(num_cpus=cpus, num_gpus=gpus, name=name)
