"""Peak memory of a job: this process and everything it started.

Owns the sampling thread. Shared pages count once over all processes (proportional set size, PSS),
so Ray's object store and forked libraries aren't counted several times.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

BYTES_PER_GIB = 1024**3


class PeakMemory:
    """Samples the memory of this process and its descendants in the background.

    A cluster that someone else started is not a descendant, so it doesn't count.
    """

    def __init__(self, *, interval_s: float = 3.0) -> None:
        self._interval_s = interval_s
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    @property
    def peak_gib(self) -> float:
        """The largest sum seen so far, in GiB."""
        return self._peak_bytes / BYTES_PER_GIB

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def sample(self) -> float:
        """Measure now, remember the peak, and return this measurement in GiB."""
        me = psutil.Process()
        total = sum(pss_bytes(process) for process in [me, *me.children(recursive=True)])
        self._peak_bytes = max(self._peak_bytes, total)
        return total / BYTES_PER_GIB

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval_s)


def pss_bytes(process: psutil.Process) -> int:
    """Proportional set size; resident size where the kernel doesn't tell; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux, no permission, or gone: psutil tells which
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
