"""The rollout actor: a thin shell that fetches units, samples them, and hands the rollouts in.

Consumes units from the coordinator and weights from the weight store. It waits at these two
only, and holds nothing that a replacement could not load again.
"""

from typing import Any

import ray
import torch

from rlgen.actors.coordinator import Stop
from rlgen.actors.shell import actor_device, explained
from rlgen.config.run import RunConfig
from rlgen.errors import RolloutError
from rlgen.policies.load import load_policy
from rlgen.sampling.sampler import Sampler


class RolloutWorker:
    """Samples units until the coordinator closes."""

    def __init__(self, name: str, config: RunConfig, coordinator: Any, weights: Any) -> None:
        torch.set_num_threads(config.rollout.threads)
        device = actor_device(config.rollout.num_gpus)
        self._name = name
        self._coordinator = coordinator
        self._weights = weights
        policy = load_policy(config, device=device)
        self._sampler = Sampler(policy, device=device, dtype=config.rollout.dtype)

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
                ray.get(self._coordinator.fail.remote(explained(error, RolloutError, self._name)))
                return

    def _hold_version(self, version: int) -> None:
        if version != self._sampler.policy_version:
            manifest, [reference] = ray.get(self._weights.fetch.remote(version))
            self._sampler.update_weights(manifest, ray.get(reference))
