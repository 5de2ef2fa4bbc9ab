"""Watches rollout and reward actors and replaces the ones that die.

Owns their life: making them, noticing their end, giving their work back. Their results do not
depend on it, because a unit comes out the same on any worker. Only infrastructure may fail a
worker without ending the run; an error in a model or a scorer ends it.
"""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rlgen.actors.coordinator import LIFE, place_of
from rlgen.errors import RlgenError

_WATCH_S = 0.2


class Supervisor:
    """Keeps a fixed number of workers per role alive."""

    def __init__(self, coordinator: Any, *, max_restarts: int) -> None:
        """Watch nobody yet.

        Args:
            coordinator: takes back what a lost worker held.
            max_restarts: how often the worker in one place may be replaced between two calls of
                `note_progress`.
        """
        self.restarts: dict[str, int] = {}
        self._deaths: Counter[str] = Counter()
        self._coordinator = coordinator
        self._max_restarts = max_restarts
        self._makers: dict[str, Callable[[str], Any]] = {}
        self._actors: dict[str, Any] = {}
        self._runs: dict[ray.ObjectRef, tuple[str, str]] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def hire(self, role: str, count: int, make: Callable[[str], Any]) -> None:
        """Make the workers of a role and set them to work; they load their models first."""
        self.restarts[role] = 0
        self._makers[role] = make
        for index in range(count):
            self._start(role, f"{role}-{index}")

    def await_crew(self, timeout_s: float) -> None:
        """Watch over all, and wait until every place is taken by a worker that has loaded.

        Raises:
            RlgenError: one failed or did not come up in time.
        """
        if not self._thread.is_alive():
            self._thread.start()
        roles = [role for role, _ in self._runs.values()]
        crew = {role: roles.count(role) for role in self._makers}
        try:
            missing = ray.get(self._coordinator.await_crew.remote(crew, timeout_s))
        except RayTaskError as error:  # its own text is a traceback; the cause is meant for people
            raise (error.cause if isinstance(error.cause, RlgenError) else error) from None
        if missing:
            listed = ", ".join(f"{number} {role}" for role, number in missing.items())
            raise RlgenError(
                f"{listed} workers did not come up within {timeout_s:g} s; see `ray status` for "
                "missing resources, or raise cluster.start_timeout_s for large models."
            )

    def note_progress(self) -> None:
        """A step was finished: deaths before it don't count any more."""
        self._deaths.clear()

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
                except RayError as error:
                    if is_infrastructure(error):
                        self._replace(role, name)
                    else:
                        self._coordinator.fail.remote(_meant_for_people(error, name))
            if not self._runs:
                return

    def _replace(self, role: str, name: str) -> None:
        place = place_of(name)
        self._deaths[place] += 1
        if self._deaths[place] > self._max_restarts:
            self._coordinator.fail.remote(
                RlgenError(
                    f"{name} died, and cluster.max_restarts = {self._max_restarts} workers in its "
                    "place before it within one step; look for out-of-memory kills in the Ray "
                    "dashboard."
                )
            )
            return
        self.restarts[role] += 1
        ray.get(self._coordinator.release.remote(name))
        ray.kill(self._actors.pop(name))
        # A new name: the coordinator gives nothing more to the old one.
        self._start(role, f"{place}{LIFE}{self.restarts[role]}")

    def _start(self, role: str, name: str) -> None:
        self._actors[name] = self._makers[role](name)
        self._runs[self._actors[name].run.remote()] = (role, name)


def is_infrastructure(error: RayError) -> bool:
    """Whether a process, a node or an object was lost, rather than an error in what it ran."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, RayError)
    return True


def _meant_for_people(error: RayError, name: str) -> RlgenError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, RlgenError) else RlgenError(f"{name} failed: {error}")
