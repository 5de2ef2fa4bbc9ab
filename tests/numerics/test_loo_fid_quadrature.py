"""The quadrature rule and the square-root trace downdates built on it."""

from __future__ import annotations

import math

import pytest
import torch

from rlgen.moments.downdate import downdate, downdate_gram, sqrt_trace
from rlgen.moments.quadrature import num_nodes, unit_nodes


def test_nodes_have_their_published_values() -> None:
    s_Q, omega_Q = unit_nodes(1e-4, 4)
    expected_s = [0.00820966, 0.04678469, 0.21374514, 1.21807698]
    expected_omega = [0.01938084, 0.07174001, 0.32775848, 2.8755571]
    # Half a unit in the last of eight printed decimals (seven for the last weight).
    torch.testing.assert_close(s_Q, torch.tensor(expected_s).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(omega_Q, torch.tensor(expected_omega).double(), rtol=0, atol=2e-7)


def test_number_of_nodes() -> None:
    assert [num_nodes(1e-12, eps) for eps in (1e-6, 1e-8, 1e-10)] == [24, 31, 38]
    assert [num_nodes(1e-16, eps) for eps in (1e-6, 1e-8, 1e-10)] == [31, 40, 49]


@pytest.mark.parametrize("ratio", [1e-4, 1e-8, 1e-12, 1e-16])
@pytest.mark.parametrize("count", [16, 24, 40, 60])
def test_node_identity_has_the_predicted_error(ratio: float, count: int) -> None:
    """(2/pi) sum omega / (lambda + s^2) = lambda^(-1/2) for every lambda in [ratio, 1]."""
    s_Q, omega_Q = unit_nodes(ratio, count)
    lambda_A = torch.logspace(math.log10(ratio), 0, 2000, dtype=torch.float64)
    sums_A = 2 / math.pi * (omega_Q / (lambda_A[:, None] + s_Q.square())).sum(dim=1)
    error = float((sums_A * lambda_A.sqrt() - 1).abs().max())
    predicted = 4 * math.exp(-2 * math.pi**2 * count / math.log(16 / ratio))
    if predicted > 1e-12:
        # The formula is asymptotic: its own relative error is of the order of the prediction.
        assert error == pytest.approx(predicted, rel=0.1)
    else:
        assert error < 2e-12


def random_matrix(rank: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randn(4 * rank, rank, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -3, rank, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
@pytest.mark.parametrize("rank", [1, 2, 3, 50])
def test_downdate_equals_eigenvalues(method: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = random_matrix(rank, generator)
    root = torch.linalg.cholesky(matrix)
    vectors = torch.randn(300, rank, generator=generator, dtype=torch.float64) @ root.T
    # Positive definite after the downdate: kappa w^T M^-1 w < 1, up to 0.95 for the largest.
    kappa = 0.95 / float(torch.linalg.solve(root, vectors.T).square().sum(dim=0).max())
    result = downdate(matrix, vectors, kappa, method=method)
    direct = torch.stack(
        [
            torch.linalg.eigvalsh(matrix - kappa * torch.outer(w, w)).clamp(min=0).sqrt().sum()
            for w in vectors
        ]
    )
    base = torch.linalg.eigvalsh(matrix).sqrt().sum()
    # Direct differences carry rounding of eigenvalues, 1e-16 / (2 sqrt(lambda_min)) ~ 1e-13 each.
    torch.testing.assert_close(result.delta_N, direct - base, rtol=0, atol=1e-11)
    assert result.sqrt_trace == pytest.approx(float(base), rel=1e-12)
    assert sqrt_trace(matrix, method=method) == pytest.approx(float(base), rel=1e-12)
    assert result.guard_fraction == 0


@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
def test_downdate_stays_within_its_bounds(method: str) -> None:
    """(kappa/2) w^T M^(-1/2) w <= |delta| <= sqrt(kappa) |w|, and delta <= 0."""
    generator = torch.Generator().manual_seed(1)
    matrix = random_matrix(30, generator)
    root = torch.linalg.cholesky(matrix)
    vectors = torch.randn(100, 30, generator=generator, dtype=torch.float64) @ root.T
    kappa = 0.999 / float(torch.linalg.solve(root, vectors.T).square().sum(dim=0).max())
    delta_N = downdate(matrix, vectors, kappa, method=method).delta_N
    values, eigenvectors = torch.linalg.eigh(matrix)
    first_order_N = kappa / 2 * ((vectors @ eigenvectors).square() / values.sqrt()).sum(dim=1)
    assert (delta_N <= 0).all()
    assert (-delta_N >= first_order_N).all()
    assert (-delta_N <= math.sqrt(kappa) * vectors.norm(dim=1)).all()


def test_sample_space_equals_matrix_form() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(dim=0)
    gram = downdate_gram(rows)
    matrix = downdate(rows.T @ rows / 11, rows, 12 / 121, method="eigh")
    # The matrix form sees rank 11 of 40 with rounding: sqrt(1e-15) of the largest eigenvalue.
    torch.testing.assert_close(gram.delta_N, matrix.delta_N, rtol=0, atol=1e-6)
    assert gram.sqrt_trace == pytest.approx(matrix.sqrt_trace, abs=1e-6)


@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
def test_zero_matrix_does_not_change(method: str) -> None:
    result = downdate(
        torch.zeros(5, 5, dtype=torch.float64),
        torch.zeros(3, 5, dtype=torch.float64),
        0.1,
        method=method,
    )
    assert result.delta_N.tolist() == [0.0, 0.0, 0.0]
    assert result.sqrt_trace == 0.0
