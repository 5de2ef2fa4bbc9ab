"""Watches rollout and reward actors and replaces the ones that die.

Owns their life: making them, noticing their end, giving their work back. Their results do not
depend on it, because a unit comes out the same on any worker. Only infrastructure may fail a
worker without ending the run; an error in a model or a scorer ends it.
"""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from rlgen.actors.coordinator import LIFE, place_of
from rlgen.errors import RlgenError, RoleLost

_WATCH_S = 0.2


@dataclass(frozen=True)
class _Crew:
    """The workers of a role."""

    make: Callable[[str], Any]
    fewest: int
    most: int


class Supervisor:
    """Keeps the workers of every role alive, between the fewest and the most."""

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
        self._crews: dict[str, _Crew] = {}
        self._actors: dict[str, Any] = {}
        self._runs: dict[ray.ObjectRef, tuple[str, str]] = {}
        self._lives: Counter[str] = Counter()
        self._lock = threading.RLock()  # the caller's thread and the watching one
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def hire(self, role: str, make: Callable[[str], Any], *, fewest: int, most: int) -> None:
        """Make the workers that a role must have; they load their models, then work.

        Args:
            role: begins the names of its workers.
            make: creates the actor of this name.
            fewest: how many `await_crew` waits for.
            most: how many there are after `expand`, as far as the cluster has room.
        """
        self.restarts[role] = 0
        self._crews[role] = _Crew(make, fewest, most)
        for index in range(fewest):
            self._start(role, f"{role}-{index}")

    def expand(self) -> None:
        """Ask for the workers beyond the fewest.

        Each comes up as soon as a node has room for it, now or later, and an autoscaler sees those
        that wait. One that is lost with its node waits for the next node.
        """
        with self._lock:
            here = {place_of(name) for name in self._actors}
            for role, crew in self._crews.items():
                for place in (f"{role}-{index}" for index in range(crew.fewest, crew.most)):
                    if place not in here:
                        self._start(role, place)

    def shrink(self) -> None:
        """Let the workers beyond the fewest go: what must be there comes up before them."""
        with self._lock:
            for name in [name for name in self._actors if self._is_extra(name)]:
                self._dismiss(name)

    def await_crew(self, timeout_s: float, *, is_again: bool = False) -> None:
        """Watch over all, and wait until the fewest workers of every role have loaded.

        Args:
            timeout_s: longest wait, in seconds.
            is_again: they were there before, so whoever is missing was lost.
        Raises:
            RlgenError: one failed, or did not come up in time.
            RoleLost: one did not come up in time again.
        """
        if not self._thread.is_alive():
            self._thread.start()
        crew = {role: crew.fewest for role, crew in self._crews.items()}
        try:
            missing = ray.get(self._coordinator.await_crew.remote(crew, timeout_s))
        except RayTaskError as error:  # its own text is a traceback; the cause is meant for people
            raise (error.cause if isinstance(error.cause, RlgenError) else error) from None
        if missing:
            listed = ", ".join(f"{number} {role}" for role, number in missing.items())
            kind = RoleLost if is_again else RlgenError
            raise kind(
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
            with self._lock:
                runs = list(self._runs)
            if not runs:
                return
            ended, _ = ray.wait(runs, num_returns=1, timeout=_WATCH_S)
            for reference in ended:
                if self._is_closed.is_set():
                    return
                with self._lock:
                    self._look_after(reference)

    def _look_after(self, reference: ray.ObjectRef) -> None:
        """See why a worker ended."""
        role, name = self._runs.pop(reference, ("", ""))
        if not name:  # it was dismissed meanwhile
            return
        try:
            ray.get(reference)  # told to stop
        except RayError as error:
            if _is_loss_beside_driver(error):
                self._coordinator.fail.remote(RoleLost(f"{name} found no weight store any more."))
            elif is_infrastructure(error):
                self._replace(role, name)
            else:
                self._coordinator.fail.remote(_meant_for_people(error, name))

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
        self._dismiss(name)
        self._start(role, place)

    def _dismiss(self, name: str) -> None:
        """Take a worker's work back, and end it if it lives."""
        self._runs = {ref: run for ref, run in self._runs.items() if run[1] != name}
        with suppress(RayError):  # without a coordinator all starts anew
            # One beyond the fewest may wait for a node: that is no recovery.
            ray.get(self._coordinator.release.remote(name, is_missed=not self._is_extra(name)))
        ray.kill(self._actors.pop(name))

    def _is_extra(self, name: str) -> bool:
        role, _, index = place_of(name).rpartition("-")
        return int(index) >= self._crews[role].fewest

    def _start(self, role: str, place: str) -> None:
        # Always a new name: the coordinator gives nothing more to one that was released.
        name = f"{place}{LIFE}{self._lives[place]}" if self._lives[place] else place
        self._lives[place] += 1
        self._actors[name] = self._crews[role].make(name)
        self._runs[self._actors[name].run.remote()] = (role, name)


def is_infrastructure(error: RayError) -> bool:
    """Whether a process, a node or an object was lost, rather than an error in what it ran."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, RayError)
    return True


def _is_loss_beside_driver(error: RayError) -> bool:
    """Whether the worker lives and an actor that it called does not: a new worker helps nothing."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, ActorDiedError)


def _meant_for_people(error: RayError, name: str) -> RlgenError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, RlgenError) else RlgenError(f"{name} failed: {error}")
