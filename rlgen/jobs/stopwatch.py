"""Wall-clock times of the parts of a step."""

import time


class Stopwatch:
    """Starts when made; each lap ends a part."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the part that began with the last lap."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """`time/<name>_s` of every part, and `time/step_s` from the start to the last lap."""
        parts = {f"time/{name}_s": seconds for name, seconds in self._laps.items()}
        return parts | {"time/step_s": self._last - self._started}
