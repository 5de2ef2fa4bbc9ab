"""The rewards of a step cost at most 1/70 of one eigenvalue-based distance per sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "loo_fid.py"


@pytest.mark.slow
@pytest.mark.timing
def test_rewards_cost_a_seventieth_of_brute_force(tmp_path: Path) -> None:
    output = tmp_path / "loo_fid.json"
    arguments = ["--d", "2048", "--n", "256", "--require", "70", "--json", str(output)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert min(result["ratio_absolute"], result["ratio_centred"]) >= 70
    assert result["threads"] == 1


def test_benchmark_fails_when_the_ratio_is_missed() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--d", "32", "--n", "4", "--require", "1e9"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "below the required" in done.stderr
