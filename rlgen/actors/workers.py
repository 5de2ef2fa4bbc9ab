"""Rollout and reward actors: thin shells that fetch work, do it with a plain object, hand it in.

A rollout worker consumes units and weights and produces rollouts; a reward worker consumes
rollouts and produces scores. Both wait at the coordinator only. They hold no state that a
replacement could not load again.
"""

import traceback
from typing import Any

import ray
import torch

from rlgen.actors.coordinator import Stop
from rlgen.config.run import RunConfig
from rlgen.errors import RewardError, RlgenError, RolloutError
from rlgen.policies.load import load_policy
from rlgen.rewards.engine import RewardEngine
from rlgen.sampling.sampler import Sampler


def actor_device(num_gpus: float) -> torch.device:
    """The GPU that Ray gave this actor, or the CPU."""
    return torch.device("cuda" if num_gpus > 0 else "cpu")


class RolloutWorker:
    """Samples units until the coordinator closes."""

    def __init__(self, name: str, config: RunConfig, coordinator: Any, weights: Any) -> None:
        torch.set_num_threads(config.rollout.threads)
        device = actor_device(config.rollout.num_gpus)
        self._name = name
        self._coordinator = coordinator
        self._weights = weights
        policy = load_policy(config.policy.checkpoint, device=device)
        self._sampler = Sampler(policy, device=device)

    def ready(self) -> str:
        """Answer once the model is loaded."""
        return self._name

    def run(self) -> None:
        """Work until told to stop."""
        done = None
        while not isinstance(
            unit := ray.get(self._coordinator.next_unit.remote(self._name, done)), Stop
        ):
            done = None
            if unit is None:
                continue
            try:
                self._hold_version(unit.policy_version)
                done = self._sampler.sample(unit)
            except Exception as error:
                ray.get(self._coordinator.fail.remote(_explained(error, RolloutError, self._name)))
                return

    def _hold_version(self, version: int) -> None:
        if version != self._sampler.policy_version:
            manifest, [reference] = ray.get(self._weights.fetch.remote(version))
            self._sampler.update_weights(manifest, ray.get(reference))


class RewardWorker:
    """Scores rollouts until the coordinator closes."""

    def __init__(self, name: str, config: RunConfig, coordinator: Any) -> None:
        torch.set_num_threads(config.reward.threads)
        self._name = name
        self._coordinator = coordinator
        self._engine = RewardEngine.load(config, device=actor_device(config.reward.num_gpus))

    def ready(self) -> str:
        """Answer once the models are loaded."""
        return self._name

    def run(self) -> None:
        """Work until told to stop."""
        done = None
        while not isinstance(
            rollout := ray.get(self._coordinator.next_rollout.remote(self._name, done)), Stop
        ):
            done = None
            if rollout is None:
                continue
            try:
                done = self._engine.score(rollout)
            except Exception as error:
                ray.get(self._coordinator.fail.remote(_explained(error, RewardError, self._name)))
                return


def _explained(error: Exception, kind: type[RlgenError], worker: str) -> RlgenError:
    """The error itself if it is meant for people, else one that carries the traceback."""
    if isinstance(error, RlgenError):
        return error
    return kind(f"{worker} failed: {traceback.format_exc()}")
