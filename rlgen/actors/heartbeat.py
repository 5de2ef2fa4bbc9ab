"""Signs of life: every worker sends them, and who falls silent is killed.

Owns the beat thread of a worker process and the watchdog thread of the driver. A process that
hangs (stopped, swapped out, stuck in a driver) looks alive to Ray. Killed, it takes the way of
any dead process; what follows is not decided here.
"""

import logging
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_BEAT_S = 1.0
_LOOK_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pulse:
    """Where the process of a worker is."""

    worker: str
    node_id: str
    pid: int


def start_beating(coordinator: Any, worker: str) -> None:
    """Send signs of life for as long as this process runs; call it once models are loaded."""
    pulse = Pulse(worker, ray.get_runtime_context().get_node_id(), os.getpid())

    def beat() -> None:
        while True:
            coordinator.beat.remote(pulse)
            pause.wait(_BEAT_S)

    pause = threading.Event()
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def kill_process(pulse: Pulse) -> None:
    """Kill a worker's process on its node, without waiting for it."""
    here = NodeAffinitySchedulingStrategy(node_id=pulse.node_id, soft=False)
    _kill.options(scheduling_strategy=here).remote(pulse.pid)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    # The number may belong to someone else by now.
    if psutil.pid_exists(pid) and "ray::" in " ".join(psutil.Process(pid).cmdline()):
        os.kill(pid, signal.SIGKILL)


class Watchdog:
    """Kills workers that were silent for too long."""

    def __init__(self, coordinator: Any, *, timeout_s: float) -> None:
        """Start watching.

        Args:
            coordinator: where the signs of life arrive.
            timeout_s: longest silence, in seconds.
        """
        self.num_killed = 0
        self._coordinator = coordinator
        self._timeout_s = timeout_s
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_closed.wait(_LOOK_S):
            try:
                silent = ray.get(
                    self._coordinator.take_silent.remote(self._timeout_s), timeout=_LOOK_S * 10
                )
            except RayError:  # the coordinator died or hangs: the driver's own deadline sees to it
                continue
            for pulse in silent:
                self.num_killed += 1
                _log.warning("%s was silent for %g s; killing it", pulse.worker, self._timeout_s)
                kill_process(pulse)
