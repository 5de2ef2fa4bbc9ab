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
"""Relative size below which an eigenvalue beyond the rank that the count allows is rounding."""


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
        factor_FR, other_FF = _factor(cov_a_FF, a.count), cov_b_FF
    else:
        factor_FR, other_FF = _factor(cov_b_FF, b.count), cov_a_FF
    product_RR = factor_FR.T @ other_FF @ factor_FR
    eigenvalues_R = torch.linalg.eigvalsh((product_RR + product_RR.T) / 2)
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


def _factor(cov_FF: Tensor, count: float) -> Tensor:
    """L with L L^T = cov, [F, R]; from eigenvectors in descending order if cov is near-singular.

    The descending order makes the product graded, which keeps more digits of small eigenvalues.
    """
    if count > len(cov_FF):
        lower_FF, info = torch.linalg.cholesky_ex(cov_FF)
        pivots_F = lower_FF.diagonal().square()
        if info == 0 and pivots_F.min() > ROUNDING_EIGENVALUE * pivots_F.max():
            return lower_FF
    values_F, vectors_FF = torch.linalg.eigh(cov_FF)
    values_F, vectors_FF = values_F.flip(0).clamp(min=0), vectors_FF.flip(1)
    ranks_F = torch.arange(1, len(values_F) + 1, device=values_F.device)
    is_rounding_F = (ranks_F > count - 1) & (values_F <= ROUNDING_EIGENVALUE * values_F[0])
    keep_F = (values_F > 0) & ~is_rounding_F
    return vectors_FF[:, keep_F] * values_F[keep_F].sqrt()
