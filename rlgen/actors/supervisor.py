"""Watches rollout and reward actors and replaces the ones that die.

Owns their life: making them, noticing their end, giving their work back. Their results do not
depend on it, because a unit comes out the same on any worker.
"""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlgen.errors import RlgenError

_WATCH_S = 0.2


class Supervisor:
    """Keeps a fixed number of workers per role alive."""

    def __init__(self, coordinator: Any, *, max_restarts: int) -> None:
        """Watch nobody yet."""
        self.restarts: dict[str, int] = {}
        self._coordinator = coordinator
        self._max_restarts = max_restarts
        self._makers: dict[str, Callable[[str], Any]] = {}
        self._actors: dict[str, Any] = {}
        self._runs: dict[ray.ObjectRef, tuple[str, str]] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def hire(self, role: str, count: int, make: Callable[[str], Any]) -> None:
        """Make the workers of a role; they load their models meanwhile."""
        self.restarts[role] = 0
        self._makers[role] = make
        for index in range(count):
            name = f"{role}-{index}"
            self._actors[name] = make(name)

    def await_ready(self, timeout_s: float) -> None:
        """Wait until all have loaded, then set them to work.

        Raises:
            RlgenError: one failed or did not come up in time.
        """
        pending = {actor.ready.remote(): name for name, actor in self._actors.items()}
        ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
        if late:
            names = ", ".join(sorted(pending[ref] for ref in late))
            raise RlgenError(
                f"{names} did not come up within {timeout_s:g} s; see `ray status` for missing "
                "resources, or raise cluster.start_timeout_s for large models."
            )
        try:
            ray.get(ready)
        except RayTaskError as error:  # its own text is a traceback; the cause is meant for people
            raise (error.cause if isinstance(error.cause, RlgenError) else error) from None
        for name, actor in self._actors.items():
            self._runs[actor.run.remote()] = (name.rsplit("-", 1)[0], name)
        self._thread.start()

    def close(self) -> None:
        """Stop watching and let the workers go."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _watch(self) -> None:
        while not self._is_closed.is_set():
            ended, _ = ray.wait(list(self._runs), num_returns=1, timeout=_WATCH_S)
            for reference in ended:
                if self._is_closed.is_set():
                    return
                role, name = self._runs.pop(reference)
                try:
                    ray.get(reference)  # told to stop
                except RayActorError:
                    self._replace(role, name)
                except RayError as error:
                    self._coordinator.fail.remote(RlgenError(f"{name} failed: {error}"))
            if not self._runs:
                return

    def _replace(self, role: str, name: str) -> None:
        self.restarts[role] += 1
        if sum(self.restarts.values()) > self._max_restarts:
            self._coordinator.fail.remote(
                RlgenError(
                    f"{name} died and cluster.max_restarts = {self._max_restarts} workers were "
                    "replaced already; look for out-of-memory kills in the Ray dashboard."
                )
            )
            return
        ray.get(self._coordinator.release.remote(name))
        self._actors.pop(name)
        # A new name: the coordinator gives nothing more to the old one.
        new_name = f"{role}-{name.rsplit('-', 1)[1].split('r')[0]}r{self.restarts[role]}"
        actor = self._makers[role](new_name)
        self._actors[new_name] = actor
        self._runs[actor.run.remote()] = (role, new_name)
