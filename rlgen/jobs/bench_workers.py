"""Workers that sleep in place of computing, for measuring what organises the work.

They run the loops of the real ones against the real coordinator, and send messages of a real
shape; weights stay at home. Imports no torch, so that a hundred fit on a small machine.

Shapes: B images of a unit, L image tokens, F feature dimensions.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlgen.actors.coordinator import LEARNER, LearnerCommand
from rlgen.actors.heartbeat import start_beating
from rlgen.actors.shell import work_until_stopped
from rlgen.errors import RewardError, RolloutError
from rlgen.types import (
    LearnerBatch,
    Rollout,
    ScoredRollout,
    StepRewards,
    WorkUnit,
)

NUM_TOKENS = 256
"""L, as for an image of 256 x 256 pixels."""
NUM_FEATURES = 64
"""F."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds that each stage sleeps."""

    sample_s: float
    """Per unit."""
    score_s: float
    """Per unit."""
    learn_s: float
    """Per step."""


class SleepingWorker:
    """What the sleeping workers share."""

    def __init__(self, name: str, times: StageTimes, coordinator: Any) -> None:
        self._name = name
        self._times = times
        self._coordinator = coordinator


class SleepingSampler(SleepingWorker):
    """In place of RolloutWorker."""

    def run(self) -> None:
        """Work until told to stop."""
        fetch = self._coordinator.next_unit
        work_until_stopped(
            self._coordinator, self._name, fetch=fetch, work=self._sample, kind=RolloutError
        )

    def _sample(self, unit: WorkUnit) -> Rollout:
        time.sleep(self._times.sample_s)
        return Rollout(
            unit=unit,
            policy_version=unit.policy_version,
            tokens_BL=tokens_of(unit),
            rollout_logprobs_BL=np.zeros((unit.num_images, NUM_TOKENS), np.float32),
            sampling_s=self._times.sample_s,
        )


def tokens_of(unit: WorkUnit) -> np.ndarray:
    """Codes that depend on nothing but the unit, int32 [B, L]."""
    digest = hashlib.sha256(f"{unit.seed} {unit.unit_id}".encode()).digest()
    row = np.resize(np.frombuffer(digest, np.uint8), NUM_TOKENS).astype(np.int32)
    return np.tile(row, (unit.num_images, 1))


class SleepingScorer(SleepingWorker):
    """In place of RewardWorker."""

    def run(self) -> None:
        """Work until told to stop."""
        fetch = self._coordinator.next_rollout
        work_until_stopped(
            self._coordinator, self._name, fetch=fetch, work=self._score, kind=RewardError
        )

    def _score(self, rollout: Rollout) -> ScoredRollout:
        time.sleep(self._times.score_s)
        num_images = rollout.unit.num_images
        return ScoredRollout(
            rollout=rollout,
            rewards={"asleep": np.zeros(num_images, np.float32)},
            features_BF=np.zeros((num_images, NUM_FEATURES), np.float32),
            judge_features_BF=None,
            judge_hits_B=None,
            images_u8=None,
            scoring_s=self._times.score_s,
        )


class ForgetfulStore:
    """In place of MomentStoreActor: every image has the same advantage, and nothing is kept."""

    def commit(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """Answer at once."""
        assert features_BF is not None, "the scorers send features"
        return StepRewards(step, np.zeros(len(features_BF), np.float32), dict(rewards), {})

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class SleepingLearner:
    """In place of a learner rank: follows the coordinator's commands."""

    def __init__(self, times: StageTimes, coordinator: Any) -> None:
        self._times = times
        self._coordinator = coordinator

    def run(self, attempt: int, rank: int) -> None:
        """Work until told to stop."""
        start_beating(self._coordinator, f"{LEARNER}{attempt}-{rank}")
        number = 0
        while True:
            command: LearnerCommand | None = ray.get(
                self._coordinator.next_command.remote(attempt, rank, number)
            )
            if command is None:
                continue
            if command.kind == "stop":
                return
            answer = self._learn(command.batches[0]) if command.batches else None
            ray.get(self._coordinator.answer.remote(attempt, rank, number, answer))
            number += 1

    def _learn(self, batch: LearnerBatch) -> dict[str, float]:
        time.sleep(self._times.learn_s)
        return {"policy/lag_steps": float(batch.step - batch.policy_version)}


def process_id(_: Any) -> int:
    """Of the actor that runs this; it lives here because this module is light."""
    return os.getpid()
