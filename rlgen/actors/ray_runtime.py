"""The roles of a run as Ray actors; the arithmetic is the same as in LocalRuntime.

Owns every long-lived actor: all are made here, in the driver, so that none dies with another.
The driver waits at the coordinator, with a deadline on every wait. Workers and moment store are
replaced while the step goes on; the loss of the learners, or of an actor beside the driver, comes
out as RoleLost, and `start` with the newest checkpoint makes what is missing.
"""

import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlgen.actors.coordinator import LEARNER, Coordinator, LearnerCommand
from rlgen.actors.heartbeat import Watchdog, kill_process
from rlgen.actors.learner_group import LearnerGroup
from rlgen.actors.moment_client import MomentStoreClient
from rlgen.actors.moment_store import MomentStoreActor
from rlgen.actors.placement import check_capacity, connect, role_options
from rlgen.actors.reward_worker import RewardWorker
from rlgen.actors.rollout_worker import RolloutWorker
from rlgen.actors.shell import brief
from rlgen.actors.supervisor import Supervisor
from rlgen.actors.weight_store import WeightStore
from rlgen.config.roles import role_resources
from rlgen.config.run import RunConfig
from rlgen.errors import RlgenError, RoleLost
from rlgen.learner.batch import split_batch
from rlgen.learner.checkpoint import Part
from rlgen.types import GroupCounts, Health, LearnerBatch, ScoredRollout, StepRewards, WorkUnit

_GOODBYE_S = 10.0
_MOST_CALLS = 10_000
"""Calls that may wait at the coordinator at once: one of every worker; Ray's own limit is 1000."""


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
        self._attempt = 0
        self._restarts: Counter[str] = Counter()
        self._recovery_s: float | None = None
        self._groups = self._past_groups = GroupCounts()
        try:
            roles = role_resources(config, with_learner=with_learner)
            check_capacity(roles, timeout_s=config.cluster.placement_timeout_s)
        except BaseException:
            ray.shutdown()
            raise

    def start(self, config: RunConfig) -> None:
        """See Runtime; all roles come up side by side."""
        self._config = config
        timeout_s = config.cluster.start_timeout_s
        began = time.monotonic()
        is_first = self._supervisor is None
        if not is_first:
            self._end_attempt()
        if self._supervisor is None:
            self._hire()
        assert self._supervisor is not None, "hired"
        if self._with_learner:
            self._start_learners()
            self._store.await_ready() if is_first else self._store.reset()
        self._supervisor.await_crew(timeout_s, is_again=not is_first)
        if self._with_learner:
            # The first answer shows that the learners are up and have published their weights.
            self._command(LearnerCommand("digest"), timeout_s)
        self._supervisor.expand()  # last: who may be missing must not take a learner's place
        self._recovery_s = None if is_first else time.monotonic() - began

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
        self._store.bootstrap(features_BF)

    def commit_moments(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """See Runtime."""
        return self._store.commit(step, rewards, features_BF)

    def learn(self, batch: LearnerBatch) -> dict[str, float]:
        """See Runtime."""
        world_size = self._config.learner.num_workers
        batches = tuple(
            split_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)
        )
        metrics = self._command(LearnerCommand("learn", batches))
        if self._supervisor is not None:
            self._supervisor.note_progress()
        return metrics

    def save_learner(self, uri: str) -> None:
        """See Runtime."""
        self._command(LearnerCommand("save", uri=uri))

    def learner_saved(self, uri: str) -> list[Part] | None:
        """See Runtime."""
        return self._get(self._coordinator.learner_saved.remote(uri), "the coordinator")

    def moment_state(self) -> dict[str, Any]:
        """See Runtime."""
        return self._store.state_dict()

    def restore_moments(self, state: Mapping[str, Any]) -> None:
        """See Runtime."""
        self._store.load_state_dict(state)

    def policy_sha256(self) -> str:
        """See Runtime."""
        return self._command(LearnerCommand("digest"))

    def health(self) -> Health:
        """See Runtime."""
        roles = dict(self._count_restarts())
        if self._with_learner:
            roles["learner"] = self._attempt
        report = self._coordinator.report.remote()
        self._groups, recovery_s, crew = self._get(report, "the coordinator")
        if self._with_learner and self._store.recovery_s is not None:
            recovery_s["moment_store"] = self._store.recovery_s
        if self._recovery_s is not None:
            recovery_s["learner"] = self._recovery_s
        workers = {role: crew[role] for role in ("rollout", "reward")}
        return Health(roles, recovery_s, self._past_groups + self._groups, workers)

    def close(self) -> None:
        """Send everyone home and disconnect."""
        if not ray.is_initialized():
            return
        self._dismiss()
        ray.shutdown()

    def _hire(self) -> None:
        """Make every actor but the learners."""
        config = self._config
        # Beside the driver: they are lost with it, and with nothing else.
        self._coordinator = _beside_driver(Coordinator).remote(self._attempt)
        self._weights = _beside_driver(WeightStore).remote(config.max_policy_lag + 2)
        self._watchdog = Watchdog(self._coordinator, timeout_s=config.cluster.heartbeat_timeout_s)
        if self._with_learner:
            self._store = MomentStoreClient(
                self._make_moment_store,
                wait=self._wait_for_store,
                max_restarts=config.cluster.max_restarts,
            )
        self._supervisor = Supervisor(self._coordinator, max_restarts=config.cluster.max_restarts)
        for role, crew, make in (
            ("rollout", config.rollout, self._make_rollout_worker),
            ("reward", config.reward, self._make_reward_worker),
        ):
            fewest = crew.min_workers or crew.num_workers
            self._supervisor.hire(role, make, fewest=fewest, most=crew.num_workers)

    def _start_learners(self) -> None:
        self._learners = LearnerGroup(
            self._config,
            coordinator=self._coordinator,
            weights=self._weights,
            attempt=self._attempt,
            run_name=self._name,
            storage=self._storage,
        )

    def _end_attempt(self) -> None:
        """Let go of the learners, and of everything if coordinator or weight store are gone."""
        self._attempt += 1
        try:
            if self._supervisor is not None:
                self._supervisor.shrink()
            ranks = ray.get(self._coordinator.pulses.remote(LEARNER), timeout=_GOODBYE_S)
            ray.get(self._coordinator.rewind.remote(self._attempt), timeout=_GOODBYE_S)
            ray.get(self._weights.rewind.remote(), timeout=_GOODBYE_S)
        except (GetTimeoutError, RayActorError):
            self._dismiss()
            return
        # Told to stop by the rewind; those that are stuck are killed.
        if self._learners is not None and not self._learners.join(_GOODBYE_S):
            for pulse in ranks:
                kill_process(pulse)
            self._learners.join(_GOODBYE_S)

    def _dismiss(self) -> None:
        """Send everyone home; what hangs or is gone already does not matter."""
        if self._supervisor is None:
            return
        self._watchdog.close()
        self._coordinator.close.remote()
        if self._learners is not None:
            self._learners.join(_GOODBYE_S)
        self._supervisor.close()
        self._restarts = self._count_restarts()
        if self._with_learner:
            self._store.close()
        ray.kill(self._coordinator)
        ray.kill(self._weights)
        self._past_groups += self._groups.closed()
        self._groups = GroupCounts()
        self._supervisor = self._learners = None

    def _count_restarts(self) -> Counter[str]:
        """Of workers and moment store, also of those that were all let go."""
        counted = Counter(self._restarts)
        if self._supervisor is not None:
            counted.update(self._supervisor.restarts)
            if self._with_learner:
                counted["moment_store"] += self._store.restarts
        return counted

    def _make_moment_store(self, number: int) -> Any:
        shell = ray.remote(MomentStoreActor).options(
            name=f"{self._name}-{self._attempt}-{number}-moments",
            num_cpus=self._config.reward.num_cpus,
            label_selector=dict(self._config.learner.label_selector),
        )
        return shell.remote(self._config, self._coordinator)

    def _make_rollout_worker(self, name: str) -> Any:
        shell = ray.remote(RolloutWorker).options(**role_options(self._config.rollout))
        return shell.remote(name, self._config, self._coordinator, self._weights)

    def _make_reward_worker(self, name: str) -> Any:
        shell = ray.remote(RewardWorker).options(**role_options(self._config.reward))
        return shell.remote(name, self._config, self._coordinator)

    def _command(self, command: LearnerCommand, timeout_s: float | None = None) -> Any:
        number = self._get(self._coordinator.send.remote(command), "the coordinator")
        answer = self._coordinator.wait_answer.remote(number, self._config.learner.num_workers)
        return self._get(answer, f"the learners ({command.kind})", timeout_s)

    def _get(self, reference: Any, awaited: str, timeout_s: float | None = None) -> Any:
        """Wait with a deadline; errors come out as what they are."""
        try:
            return self._wait(reference, awaited, timeout_s)
        except RayActorError as error:
            raise RoleLost(f"the process behind {awaited} died ({brief(error)}).") from None

    def _wait_for_store(self, reference: Any) -> Any:
        return self._wait(reference, "the moment store", None)

    def _wait(self, reference: Any, awaited: str, timeout_s: float | None) -> Any:
        limit = timeout_s or self._config.cluster.step_timeout_s
        try:
            return ray.get(reference, timeout=limit)
        except RayTaskError as error:
            if isinstance(error.cause, RlgenError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            raise RoleLost(
                f"no answer from {awaited} within {limit:g} s: {self._where()}. See the actors in "
                "the Ray dashboard, or raise cluster.step_timeout_s if steps take that long."
            ) from None

    def _where(self) -> str:
        try:
            return ray.get(self._coordinator.describe.remote(), timeout=_GOODBYE_S)
        except (GetTimeoutError, RayActorError):
            return "the coordinator does not answer either"


def _beside_driver(shell: type) -> Any:
    """An actor class whose process is on the driver's node and asks for no resources."""
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": _MOST_CALLS}
    return ray.remote(shell).options(**options)
