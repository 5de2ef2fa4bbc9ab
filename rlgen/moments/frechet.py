"""Frechet distance between two Gaussians given by their moments.

Owns the accurate, one-off distance used for evaluation. Must not know about EMA state or
rewards: leave_one_out.py has the incremental form.

Shapes: F feature dimensions, R kept components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlgen.errors import NumericsError
from rlgen.moments.moments import Moments

ROUNDING_EIGENVALUE = 1e-10
"""Relative size below which an eigenvalue beyond the rank that the count allows is rounding, and
below which a pivot makes a Cholesky factor untrustworthy."""
_BLOCK = 256
"""Columns that are multiplied together."""


def frechet_distance(a: Moments, b: Moments, *, unbiased: bool = False) -> float:
    """Compute the squared Frechet distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr sqrt(L^T S L) with one covariance factored as
    L L^T: a symmetric problem, so no complex square roots. The side with fewer samples is
    factored: by Cholesky if that is safe, which takes a tenth of the time, else by its eigenvectors
    without the components beyond rank count - 1, as square roots of eigenvalues that are rounding
    noise would add up to a visible error.

    Args:
        a: moments over F dimensions.
        b: moments over the same F dimensions, on the same device.
        unbiased: use divisor count - 1 on both sides, as most published tools do.
    Returns:
        The distance in squared feature units, >= 0.
    Raises:
        NumericsError: dimensions differ, a moment is not finite, or a count is too small.
    Source: Dowson and Landau (1982); FID, arXiv:1706.08500.
    """
    if a.mean_F.shape != b.mean_F.shape:
        raise NumericsError(
            f"can't compare moments over {a.mean_F.numel()} and {b.mean_F.numel()} dimensions; "
            "use features of one feature space."
        )
    cov_a_FF, cov_b_FF = _covariance(a, unbiased=unbiased), _covariance(b, unbiased=unbiased)
    if a.count <= b.count:
        factored_FF, count, other_FF = cov_a_FF, a.count, cov_b_FF
    else:
        factored_FF, count, other_FF = cov_b_FF, b.count, cov_a_FF
    lower_FF = _cholesky(factored_FF, count)
    if lower_FF is not None:
        product_RR = _lower_congruence(lower_FF, other_FF)
    else:
        factor_FR = _factor(factored_FF, count)
        product_RR = factor_FR.T @ other_FF @ factor_FR
        product_RR = (product_RR + product_RR.T) / 2
    eigenvalues_R = torch.linalg.eigvalsh(product_RR)  # reads the lower triangle alone
    cross = eigenvalues_R.clamp(min=0).sqrt().sum()
    gap_F = a.mean_F - b.mean_F
    distance = gap_F @ gap_F + cov_a_FF.trace() + cov_b_FF.trace() - 2 * cross
    if not torch.isfinite(distance):
        raise NumericsError(
            f"the Frechet distance is {float(distance)}; moments of {a.count:g} and {b.count:g} "
            "samples hold values that are not finite or too large."
        )
    return max(float(distance), 0.0)


def _covariance(moments: Moments, *, unbiased: bool) -> Tensor:
    if not (torch.isfinite(moments.mean_F).all() and torch.isfinite(moments.cov_FF).all()):
        raise NumericsError(f"moments of {moments.count:g} samples are not finite.")
    if not unbiased:
        return moments.cov_FF
    if moments.count <= 1:
        raise NumericsError(
            f"an unbiased covariance needs at least 2 samples, got {moments.count:g}; "
            "add samples or use unbiased=False."
        )
    return moments.cov_FF * (moments.count / (moments.count - 1))


def _cholesky(cov_FF: Tensor, count: float) -> Tensor | None:
    """The lower triangular L with L L^T = cov; None if cov is singular or nearly so."""
    if count <= len(cov_FF):
        return None
    lower_FF, info = torch.linalg.cholesky_ex(cov_FF)
    pivots_F = lower_FF.diagonal().square()
    is_safe = bool(info == 0) and bool(pivots_F.min() > ROUNDING_EIGENVALUE * pivots_F.max())
    return lower_FF if is_safe else None


def _lower_congruence(lower_FF: Tensor, cov_FF: Tensor) -> Tensor:
    """The lower triangle of L^T S L, without the products with L's zeros: a third of the work."""
    half_FF, product_FF = torch.empty_like(cov_FF), torch.zeros_like(cov_FF)
    starts = range(0, len(cov_FF), _BLOCK)
    for i in starts:
        part = slice(i, i + _BLOCK)
        half_FF[:, part] = cov_FF[:, i:] @ lower_FF[i:, part]
    for i in starts:
        part, upto = slice(i, i + _BLOCK), slice(0, i + _BLOCK)
        product_FF[part, upto] = lower_FF[i:, part].T @ half_FF[i:, upto]
    return product_FF


def _factor(cov_FF: Tensor, count: float) -> Tensor:
    """L with L L^T = cov, columns by descending eigenvalue (graded: better small eigenvalues)."""
    values_F, vectors_FF = torch.linalg.eigh(cov_FF)
    values_F, vectors_FF = values_F.flip(0).clamp(min=0), vectors_FF.flip(1)
    ranks_F = torch.arange(1, len(values_F) + 1, device=values_F.device)
    is_rounding_F = (ranks_F > count - 1) & (values_F <= ROUNDING_EIGENVALUE * values_F[0])
    keep_F = (values_F > 0) & ~is_rounding_F
    return vectors_FF[:, keep_F] * values_F[keep_F].sqrt()
