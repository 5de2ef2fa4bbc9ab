"""The distance of one batch to the reference, with more and with fewer samples than dimensions."""

from __future__ import annotations

import pytest
import torch

from rlgen.moments.batch_distance import batch_distance
from rlgen.moments.coordinates import to_coordinates
from rlgen.moments.ema import EmaState
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.leave_one_out import leave_one_out
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import ReferenceMoments


def draw(count: int, width: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    normal = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return normal @ mixing / width**0.5 + shift


def reference_of(width: int, *, rank: int | None = None) -> ReferenceMoments:
    rows = draw(4 * width, width, 0)
    if rank is not None:
        rows[:, rank:] = 0
    moments = batch_moments(rows)
    return ReferenceMoments("toy", 4 * width, moments.mean_F, moments.cov_FF)


@pytest.mark.parametrize(
    ("count", "width"), [(2, 6), (5, 6), (6, 6), (7, 6), (40, 6), (30, 600), (560, 600), (700, 520)]
)
def test_it_is_the_frechet_distance_of_the_batchs_moments(count: int, width: int) -> None:
    reference = reference_of(width)
    rows = draw(count, width, 1, shift=0.3)
    expected = frechet_distance(batch_moments(rows), reference.moments)
    # Square roots of eigenvalues that are rounding: 1e-8 of order 1 for each.
    assert batch_distance(rows, to_coordinates(reference)) == pytest.approx(expected, rel=1e-7)


def test_a_singular_and_a_truncated_reference_work() -> None:
    singular = reference_of(8, rank=3)
    rows = draw(50, 8, 2)
    expected = frechet_distance(batch_moments(rows), singular.moments)
    assert batch_distance(rows, to_coordinates(singular)) == pytest.approx(expected, rel=1e-7)
    whole = reference_of(8)
    truncated = to_coordinates(whole, max_components=3)
    basis = truncated.components_FR
    small = ReferenceMoments(
        "toy", whole.count, basis.T @ whole.mean_F, basis.T @ whole.cov_FF @ basis
    )
    expected = frechet_distance(batch_moments(rows @ basis), small.moments)
    assert batch_distance(rows, truncated) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_it_is_what_an_average_without_history_says(covariance) -> None:
    reference = to_coordinates(reference_of(6))
    rows = draw(40, 6, 3, shift=0.2)
    empty = EmaState.empty(reference)
    outcome = leave_one_out(empty, rows, reference, decay=0.0, covariance=covariance)
    found = batch_distance(rows, reference, covariance=covariance)
    assert found == pytest.approx(outcome.fid, rel=1e-10)


def test_it_does_not_see_how_samples_are_ordered_and_grows_with_fewer() -> None:
    reference = to_coordinates(reference_of(12))
    rows = draw(4000, 12, 0)
    assert batch_distance(rows, reference) == pytest.approx(
        batch_distance(rows.flip(0), reference), rel=1e-12
    )
    many = batch_distance(rows, reference)
    few = sum(batch_distance(part, reference) for part in rows.split(40)) / 100
    assert few > many + 0.1, "the bias that makes it comparable between batches of one size only"
