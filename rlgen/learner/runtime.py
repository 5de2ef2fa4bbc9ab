"""What the GRPO job needs from the roles, wherever they run, and the in-process version of it.

Owns the protocol and `LocalRuntime`, the plain objects without actors: it serves tests and
machines without Ray. The Ray version is actors/ray_runtime.py; both do the same arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from rlgen.config.run import RunConfig
from rlgen.errors import StorageError
from rlgen.learner.checkpoint import Part
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import LearnerSaver, SaveOutcome, restore_learner
from rlgen.nn.flat import pack_weights
from rlgen.nn.weights import state_sha256
from rlgen.policies.load import load_policy
from rlgen.rewards.engine import RewardEngine
from rlgen.rewards.moment_store import MomentStore
from rlgen.sampling.sampler import Sampler
from rlgen.types import (
    GroupCounts,
    Health,
    LearnerBatch,
    ScoredRollout,
    StepRewards,
    WorkUnit,
)


class Runtime(Protocol):
    """The roles of a run. Calls are made in the order of the steps, by one thread."""

    def start(self, config: RunConfig) -> None:
        """Bring every role up, at the base policy or at the checkpoint that config resumes from.

        May be called again, after RoleLost or to go on elsewhere: units that are open are
        forgotten, the learner starts anew, the samplers and scorers stay.
        """

    def submit(self, units: Sequence[WorkUnit]) -> None:
        """Queue units for sampling and scoring; returns at once."""

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        """Wait for submitted units; results in the order of the units."""

    def bootstrap_moments(self, features_BF: np.ndarray) -> None:
        """Start the moment store from the base policy's features."""

    def commit_moments(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """Commit one step to the moment store."""

    def learn(self, batch: LearnerBatch) -> dict[str, float]:
        """Update the policy and publish version step + 1 to the samplers."""

    def save_learner(self, uri: str) -> None:
        """Copy the learner's state and begin to write it; returns when the copy is made."""

    def learner_saved(self, uri: str) -> list[Part] | None:
        """The learner's parts of a checkpoint; None while they are being written.

        May be called from another thread.

        Raises:
            StorageError: they can't be written.
            RoleLost: no one writes them any more.
        """

    def moment_state(self) -> dict[str, Any]:
        """The moment store's part of a checkpoint."""

    def restore_moments(self, state: Mapping[str, Any]) -> None:
        """Rewind the moment store."""

    def policy_sha256(self) -> str:
        """Digest of the policy's tensors."""

    def health(self) -> Health:
        """Processes replaced and groups generated so far."""

    def close(self) -> None:
        """Let go of everything; safe to call twice."""


class LocalRuntime:
    """All roles as plain objects in this process; one learner rank."""

    def __init__(self, config: RunConfig, *, with_learner: bool = True) -> None:
        """Load every model; nothing is sampled yet.

        Args:
            config: the run.
            with_learner: False only samples and scores units of version 0, the policy as
                configured: no learner and no moment store then.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(config.learner.threads)
        self._device, self._with_learner = device, with_learner
        if with_learner:
            self._store = MomentStore(config)
        self._sampler = Sampler(
            load_policy(config, device=device), device=device, dtype=config.rollout.dtype
        )
        self._engine = RewardEngine.load(config, device=device)
        self._scored: dict[str, ScoredRollout] = {}
        self._saves: dict[str, SaveOutcome] = {}
        self._saver = LearnerSaver(self._saves.__setitem__)
        self._counts = GroupCounts()

    def start(self, config: RunConfig) -> None:
        """See Runtime."""
        self._scored.clear()
        self._counts = self._counts.closed()
        if not self._with_learner:
            return
        policy = load_policy(config, device=self._device)
        self._learner = Learner(policy, config, device=self._device)
        if config.checkpoint.resume_from is not None:
            restore_learner(self._learner, config.checkpoint.resume_from)
        self._publish()

    def submit(self, units: Sequence[WorkUnit]) -> None:
        """Sample and score now: nothing else could run meanwhile."""
        for unit in units:
            self._scored[unit.unit_id] = self._engine.score(self._sampler.sample(unit))
        self._count(units, generated=1, in_flight=1)

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        """Hand out what submit made."""
        self._count(units, taken=1, in_flight=-1)
        return [self._scored.pop(unit.unit_id) for unit in units]

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
        metrics = self._learner.update(batch)
        self._publish()
        return metrics

    def save_learner(self, uri: str) -> None:
        """See Runtime."""
        self._saves.clear()
        self._saver.start(self._learner, uri)

    def learner_saved(self, uri: str) -> list[Part] | None:
        """See Runtime."""
        outcome = self._saves.get(uri)
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    def moment_state(self) -> dict[str, Any]:
        """See Runtime."""
        return self._store.state_dict()

    def restore_moments(self, state: Mapping[str, Any]) -> None:
        """See Runtime."""
        self._store.load_state_dict(state)

    def policy_sha256(self) -> str:
        """See Runtime."""
        return state_sha256(self._learner.policy_state())

    def health(self) -> Health:
        """Nothing restarts in one process, and nothing is dropped but by a new start."""
        return Health({}, {}, self._counts)

    def close(self) -> None:
        """Nothing to let go of."""

    def _count(self, units: Sequence[WorkUnit], **signs: int) -> None:
        num = sum(len(unit.class_ids_P) for unit in units if unit.purpose == "train")
        now = {name: getattr(self._counts, name) + sign * num for name, sign in signs.items()}
        self._counts = replace(self._counts, **now)

    def _publish(self) -> None:
        version = self._learner.policy_version
        self._sampler.update_weights(*pack_weights(self._learner.policy_state(), version=version))
