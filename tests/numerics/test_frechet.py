"""Frechet distance between Gaussians: closed forms, symmetry, and a general matrix root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from rlgen.errors import NumericsError
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.moments import Moments, batch_moments


def draw(seed: int, count: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return rows / torch.arange(1, width + 1) ** 0.5 + 0.1 * seed


@pytest.mark.parametrize(
    ("count", "width", "unbiased"),
    [(1, 4, False), (5, 40, False), (5, 40, True), (500, 40, False), (500, 40, True)],
)
def test_zero_on_itself(count: int, width: int, unbiased: bool) -> None:
    moments = batch_moments(draw(1, count, width))
    # Traces of order 5; singular moments included, since their rounding rank is dropped.
    assert frechet_distance(moments, moments, unbiased=unbiased) < 1e-12


def test_diagonal_gaussians_have_a_closed_form() -> None:
    var_a, var_b = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 9.0, 0.0, 0.0])
    a = Moments(1e6, torch.tensor([1.0, 2.0, 0.0, 0.0]).double(), torch.diag(var_a).double())
    b = Moments(1e6, torch.tensor([0.0, 2.0, 2.0, 0.0]).double(), torch.diag(var_b).double())
    # Mean 1 + 4; std (2-1)^2 + (1-3)^2 + 0.5^2.
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 4 + 0.25, rel=1e-14)
    assert frechet_distance(b, a) == pytest.approx(10.25, rel=1e-14)


@pytest.mark.parametrize("width", [1, 3, 12])
def test_equals_general_matrix_square_root(width: int) -> None:
    a, b = batch_moments(draw(1, 60, width)), batch_moments(draw(2, 90, width))
    root = scipy.linalg.sqrtm(a.cov_FF.numpy() @ b.cov_FF.numpy())
    gap = (a.mean_F - b.mean_F).numpy()
    expected = gap @ gap + np.trace(a.cov_FF + b.cov_FF) - 2 * np.trace(root).real
    # The general root squares the condition number: about 1e-12 here.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_fewer_samples_than_dimensions() -> None:
    """The nuclear norm of the product of centred rows is the cross term, without square roots."""
    rows_a, rows_b = draw(1, 12, 60), draw(2, 20, 60)
    a, b = batch_moments(rows_a), batch_moments(rows_b)
    product = (rows_a - a.mean_F) @ (rows_b - b.mean_F).T / (12 * 20) ** 0.5
    cross = float(torch.linalg.svdvals(product).sum())
    gap = a.mean_F - b.mean_F
    expected = float(gap @ gap + a.cov_FF.trace() + b.cov_FF.trace()) - 2 * cross
    # A root of 48 rounding eigenvalues of 1e-16 would be wrong by some 1e-7.
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-11)


def test_unbiased_scales_both_covariances() -> None:
    a, b = batch_moments(draw(1, 10, 4)), batch_moments(draw(2, 30, 4))
    scaled = [Moments(m.count, m.mean_F, m.cov_FF * m.count / (m.count - 1)) for m in (a, b)]
    expected = frechet_distance(*scaled)
    assert frechet_distance(a, b, unbiased=True) == pytest.approx(expected, rel=1e-13)
    assert abs(expected - frechet_distance(a, b)) > 1e-3


def test_bad_moments_are_refused() -> None:
    one, two = batch_moments(draw(1, 1, 4)), batch_moments(draw(1, 9, 3))
    with pytest.raises(NumericsError, match="4 and 3 dimensions"):
        frechet_distance(one, two)
    with pytest.raises(NumericsError, match="at least 2 samples, got 1"):
        frechet_distance(one, one, unbiased=True)
    broken = Moments(9.0, two.mean_F * float("nan"), two.cov_FF)
    with pytest.raises(NumericsError, match="9 samples are not finite"):
        frechet_distance(two, broken)
