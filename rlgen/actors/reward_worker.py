"""The reward actor: a thin shell that fetches rollouts, scores them, and hands the scores in.

Consumes rollouts from the coordinator and waits there only. It holds no state.
"""

from functools import cached_property
from typing import Any

import torch

from rlgen.actors.shell import actor_device, explained, work_until_stopped
from rlgen.config.run import RunConfig
from rlgen.errors import RewardError
from rlgen.rewards.engine import RewardEngine


class RewardWorker:
    """Scores rollouts until the coordinator closes."""

    def __init__(self, name: str, config: RunConfig, coordinator: Any) -> None:
        torch.set_num_threads(config.reward.threads)
        self._name = name
        self._config = config
        self._coordinator = coordinator

    @cached_property
    def _engine(self) -> RewardEngine:
        # Not in __init__, whose errors reach the driver as a dead actor and a traceback.
        try:
            device = actor_device(self._config.reward.num_gpus)
            return RewardEngine.load(self._config, device=device)
        except Exception as error:
            raise explained(error, RewardError, self._name) from None

    def ready(self) -> str:
        """Answer once the models are loaded."""
        _ = self._engine
        return self._name

    def run(self) -> None:
        """Work until told to stop."""
        self.ready()  # a replacement loads before it takes work from the others
        work_until_stopped(
            self._coordinator,
            self._name,
            fetch=self._coordinator.next_rollout,
            work=self._engine.score,
            kind=RewardError,
        )
