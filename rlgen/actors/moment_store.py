"""The named moment-store actor: the shared state of the distribution reward.

Consumes one commit a step from the driver, produces rewards and advantages. It is found by name
in the run's namespace; nobody else may hold its state.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rlgen.actors.heartbeat import start_beating
from rlgen.config.run import RunConfig
from rlgen.rewards.moment_store import MomentStore
from rlgen.types import StepRewards


class MomentStoreActor:
    """Shell of rewards.moment_store.MomentStore."""

    def __init__(self, config: RunConfig, coordinator: Any) -> None:
        torch.set_num_threads(config.reward.threads)
        self._store = MomentStore(config)
        start_beating(coordinator, "moments")

    def bootstrap(self, features_BF: np.ndarray) -> None:
        """See MomentStore.bootstrap."""
        self._store.bootstrap(features_BF)

    def commit(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """See MomentStore.commit; safe to repeat."""
        return self._store.commit(step, rewards, features_BF)

    def state_dict(self) -> dict[str, Any]:
        """See MomentStore.state_dict."""
        return self._store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See MomentStore.load_state_dict."""
        self._store.load_state_dict(state)
