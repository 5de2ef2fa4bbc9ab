"""`metrics.jsonl` of a run folder: a line for each report, in the order of their making.

Owns its lines, and that steps which are done again are in it once.
"""

import json
import time
from pathlib import Path
from typing import Any

from rlgen.storage import write_bytes


class MetricsFile:
    """The numbers of a run, step by step."""

    def __init__(self, path: Path) -> None:
        """Touch nothing yet; times count from now."""
        self._path = path
        self._began = time.monotonic()

    def append(self, step: int, row: dict[str, float]) -> None:
        """Add a line."""
        elapsed_s = time.monotonic() - self._began
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, "time_s": elapsed_s, **row}) + "\n")

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Take back the rows of later steps, which will be done again; returns them."""
        if not self._path.exists():
            return []
        rows = [json.loads(row) for row in self._path.read_text().splitlines() if row.endswith("}")]
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        write_bytes(str(self._path), kept.encode())
        return [row for row in rows if row["step"] > step]
