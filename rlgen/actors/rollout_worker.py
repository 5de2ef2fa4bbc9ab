"""The rollout actor: a thin shell that fetches units, samples them, and hands the rollouts in.

Consumes units from the coordinator and weights from the weight store. It waits at these two
only, and holds nothing that a replacement could not load again.
"""

from functools import cached_property
from typing import Any

import torch

from rlgen.actors.shell import actor_device, explained, work_until_stopped
from rlgen.actors.weight_transport import Receiver, collective_backend
from rlgen.config.run import RunConfig
from rlgen.errors import RolloutError
from rlgen.policies.load import load_policy
from rlgen.sampling.sampler import Sampler
from rlgen.types import Rollout, WorkUnit


class RolloutWorker:
    """Samples units until the coordinator closes."""

    def __init__(self, name: str, config: RunConfig, coordinator: Any, weights: Any) -> None:
        torch.set_num_threads(config.rollout.threads)
        self._name = name
        self._config = config
        self._coordinator = coordinator
        self._weights = weights

    @cached_property
    def _sampler(self) -> Sampler:
        # Not in __init__, whose errors reach the driver as a dead actor and a traceback.
        try:
            device = actor_device(self._config.rollout.num_gpus)
            policy = load_policy(self._config, device=device)
            return Sampler(policy, device=device, dtype=self._config.rollout.dtype)
        except Exception as error:
            raise explained(error, RolloutError, self._name) from None

    @cached_property
    def _receiver(self) -> Receiver:
        return Receiver(
            self._weights,
            self._config.weights,
            name=self._name,
            wait_s=self._config.cluster.step_timeout_s,
            backend=collective_backend(self._config),
        )

    def ready(self) -> str:
        """Answer once the model is loaded."""
        _ = self._sampler, self._receiver
        return self._name

    def run(self) -> None:
        """Work until told to stop."""
        self.ready()  # a replacement loads before it takes work from the others
        work_until_stopped(
            self._coordinator,
            self._name,
            fetch=self._coordinator.next_unit,
            work=self._sample,
            kind=RolloutError,
        )

    def _sample(self, unit: WorkUnit) -> Rollout:
        self._receiver.update(unit.policy_version, self._sampler.update_weights)
        return self._sampler.sample(unit)
