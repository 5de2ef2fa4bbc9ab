"""Weights of a real model's size move at a fair share of the memory bandwidth."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timing]

_TRIES = 3


def best_share(report: Path) -> float:
    """Share of the memory bandwidth in the best of seven versions, by the best copy of seven.

    Neighbours on the machine take either down to a tenth for moments, so medians tell of them.
    """
    words = ["--gigabytes", "0.7", "--receivers", "4", "--repeats", "7", "--json", str(report)]
    command = [sys.executable, "-m", "rlgen.jobs.bench", "weights", *words]
    subprocess.run(command, timeout=300, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(report.read_text())
    delivered = result["gigabytes"] * result["receivers"]
    fastest = delivered / min(run["transfer_s"] for run in result["runs"])
    return fastest / max(run["memcpy_gb_per_s"] for run in result["runs"])


def test_700_mb_reach_four_actors_at_a_third_of_the_memory_bandwidth(tmp_path: Path) -> None:
    if psutil.virtual_memory().available < 10e9:
        pytest.skip("four receivers of 0.7 GB and their learner need 10 GB of free memory")
    shares: list[float] = []
    while len(shares) < _TRIES and max(shares, default=0.0) < 1 / 3:
        shares.append(best_share(tmp_path / f"{len(shares)}.json"))
    assert max(shares) >= 1 / 3, shares
    print(f"share of the memory bandwidth: {shares}")
