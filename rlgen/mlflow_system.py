"""System metrics of the machine that the driver runs on, as MLflow's page shows them.

Owns the thread that samples, and which of MLflow's samplers there are. MLflow's own monitor can't
be used: it ends for good when one of its calls to the server fails. Who sends the samples is not
known here.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_LAST_SAMPLE_S = 2.0
_LEAST_S = 0.1  # the kernel counts CPU time in hundredths: over less, its use reads 0 or 100


class SystemSampler:
    """Takes a sample each interval, and one at the end, in a daemon thread."""

    def __init__(self, interval_s: float, take: Callable[[dict[str, float]], None]) -> None:
        """Find out what can be sampled here; takes seconds, because MLflow is imported.

        Args:
            interval_s: seconds between samples.
            take: called on the thread with each sample, by MLflow's names.
        """
        self._interval_s, self._take = interval_s, take
        self._monitors = _monitors()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample."""
        self._ending.set()
        self._thread.join(_LAST_SAMPLE_S)

    def _work(self) -> None:
        self._sample()  # CPU use is measured since this thread's call before
        began = time.monotonic()
        while not self._ending.wait(self._interval_s):
            self._take(self._sample())
            began = time.monotonic()
        time.sleep(max(0.0, began + _LEAST_S - time.monotonic()))
        self._take(self._sample())  # short runs have one too

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no NVIDIA driver
        monitors.append(GPUMonitor())
    return monitors
