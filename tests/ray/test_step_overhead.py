"""What Ray costs, measured by the benchmark that anyone can run."""

from pathlib import Path

import pytest

from tests.benchmarks.step_overhead import measure
from tests.conftest import TINY_DIGITS

pytestmark = [pytest.mark.ray, pytest.mark.timing]


def test_a_step_on_ray_takes_at_most_a_quarter_more_than_in_one_process(
    cache_folder: Path,
) -> None:
    found = measure(block_steps=3, rounds=7, settings=TINY_DIGITS)
    if found["ratio"] > 1.25:  # few pairs, and neighbours on the machine: look longer
        found = measure(block_steps=3, rounds=15, settings=TINY_DIGITS)
    assert found["ratio"] <= 1.25
