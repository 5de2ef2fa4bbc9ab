"""The driver's side of the moment store: its state outlives its process.

Owns the journal: the state that was read last, and every call that changed it since. A store that
dies before, during or after a commit is made anew, gets that state, and the calls are played
again; commits are deterministic, so rewards and state come out the same to the bit.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlgen.actors.shell import brief
from rlgen.errors import RoleLost
from rlgen.types import StepRewards

_JOURNAL_BYTES = 256 * 2**20
"""Above this the state is read instead, which shortens the journal."""


class MomentStoreClient:
    """Calls the moment store, wherever it lives now."""

    def __init__(
        self,
        make: Callable[[int], Any],
        *,
        wait: Callable[[Any], Any],
        max_restarts: int,
    ) -> None:
        """Make the store; it loads meanwhile.

        Args:
            make: creates the actor, given how many there were before; the name of a dead one may
                be taken for a while.
            wait: ray.get with the run's deadline and errors; RayActorError comes out as it is.
            max_restarts: how often one call may find the store dead.
        """
        self.restarts = 0
        self.recovery_s: float | None = None
        """Seconds that the last revival took."""
        self._make = make
        self._wait = wait
        self._max_restarts = max_restarts
        self._actor = make(0)
        self._initial: dict[str, Any] | None = None
        self._base: Mapping[str, Any] | None = None
        self._journal: list[tuple[str, tuple[Any, ...]]] = []
        self._journal_bytes = 0

    def await_ready(self) -> None:
        """Wait until the reference moments are loaded."""
        self._base = self._initial = self._call("state_dict")

    def reset(self) -> None:
        """Make the store as it was after `await_ready`."""
        if self._initial is None:
            self.await_ready()
        else:
            self.load_state_dict(self._initial)

    def bootstrap(self, features_BF: np.ndarray) -> None:
        """See MomentStore.bootstrap."""
        self._change("bootstrap", features_BF)

    def commit(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """See MomentStore.commit."""
        return self._change("commit", step, dict(rewards), features_BF)

    def state_dict(self) -> dict[str, Any]:
        """See MomentStore.state_dict."""
        state = self._call("state_dict")
        self._remember(state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See MomentStore.load_state_dict."""
        self._call("load_state_dict", dict(state))
        self._remember(state)

    def close(self) -> None:
        """Send the store home."""
        ray.kill(self._actor)

    def _change(self, method: str, *arguments: Any) -> Any:
        answer = self._call(method, *arguments)
        self._journal.append((method, arguments))
        self._journal_bytes += sum(a.nbytes for a in arguments if isinstance(a, np.ndarray))
        if self._journal_bytes > _JOURNAL_BYTES:
            self.state_dict()
        return answer

    def _remember(self, state: Mapping[str, Any]) -> None:
        self._base = state
        self._journal.clear()
        self._journal_bytes = 0

    def _call(self, method: str, *arguments: Any) -> Any:
        for _ in range(self._max_restarts + 1):
            try:
                return self._wait(getattr(self._actor, method).remote(*arguments))
            except RayActorError as error:
                reason = brief(error)
                self._revive()
        raise RoleLost(
            f"the moment store died {self._max_restarts + 1} times in one call ({reason}); look "
            "for out-of-memory kills in the Ray dashboard."
        )

    def _revive(self) -> None:
        """Make the store anew and bring it to the state of the dead one."""
        self.restarts += 1
        began = time.monotonic()
        self._actor = self._make(self.restarts)
        if self._base is None:
            return
        try:
            for method, arguments in [("load_state_dict", (self._base,)), *self._journal]:
                self._wait(getattr(self._actor, method).remote(*arguments))
            self.recovery_s = time.monotonic() - began
        except RayActorError:
            return  # the call that follows finds it dead
