"""What organising the work costs, by the benchmark that anyone can run, in a reduced form."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlgen.jobs.bench_orchestration import memory, pipelining, throughput
from tests.clusters import cluster_of

pytestmark = [pytest.mark.ray, pytest.mark.timing]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with cluster_of({"num_cpus": 2}):
        yield


def unless_disturbed(measure: Callable[[], dict[str, Any]], holds: Callable[[Any], bool]) -> Any:
    """The result, measured once more if it misses: what else runs here can only slow it down."""
    result = measure()
    return result if holds(result) else measure()


def test_eight_light_samplers_are_busy_nearly_all_the_time() -> None:
    result = unless_disturbed(
        lambda: throughput(8, unit_s=1.0, units_per_worker=1, steps=6, lag=2),
        lambda found: found["efficiency"] >= 0.95,
    )
    assert result["units"] == 48
    assert 0.95 <= result["efficiency"] <= 1.0, result
    assert result["worker_pss_mib"] < 100 and result["coordinator_pss_mib"] < 120, "no torch"


def test_without_lag_a_step_is_the_sum_of_its_stages() -> None:
    result = unless_disturbed(
        lambda: pipelining(0, stage_s=0.5, steps=3), lambda found: found["step_s"] <= 1.6
    )
    assert 1.5 <= result["step_s"] <= 1.6, result


def test_with_a_lag_of_two_a_step_is_as_long_as_its_longest_stage() -> None:
    result = unless_disturbed(
        lambda: pipelining(2, stage_s=0.5, steps=5), lambda found: found["step_s"] <= 0.575
    )
    assert 0.5 <= result["step_s"] <= 0.575, result


def test_memory_stays_flat() -> None:
    result = memory(steps=150)
    assert result["coordinator_growth_mib"] < 2, result
    assert result["driver_growth_mib"] < 8, result
