"""What Ray costs, measured by the benchmark that anyone can run."""

from pathlib import Path

import pytest

from tests.benchmarks.step_overhead import measure
from tests.conftest import TINY_DIGITS

pytestmark = [pytest.mark.ray, pytest.mark.timing]


def test_a_step_on_ray_takes_at_most_a_quarter_more_than_in_one_process(
    cache_folder: Path,
) -> None:
    assert measure(block_steps=3, rounds=13, settings=TINY_DIGITS)["ratio"] <= 1.25
