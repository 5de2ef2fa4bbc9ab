"""Mean and covariance of a set of feature vectors, mergeable in any order.

Owns the sample moments that references and metrics are made of. Must not know where the
features come from, nor how moments are stored (reference.py does).

Shapes: B samples, F feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.errors import NumericsError

_BLOCK = 256
"""Columns of a product that are computed together."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and biased covariance (divisor count) of equally weighted samples."""

    count: float
    """Number of samples."""
    mean_F: Tensor
    """[F] float64."""
    cov_FF: Tensor
    """[F, F] float64, symmetric, divisor count."""


def batch_moments(features_BF: Tensor) -> Moments:
    """Compute the moments of one batch in float64.

    Centred before squaring, so a large common offset costs no digits.

    Args:
        features_BF: [B, F] of any float type, finite, B >= 1.
    Returns:
        Moments on the device of the features.
    Raises:
        NumericsError: no samples, or a feature is not finite; names the sample.
    """
    if features_BF.ndim != 2 or features_BF.shape[0] == 0:
        raise NumericsError(
            f"moments need features of shape [B, F] with B >= 1, got {list(features_BF.shape)}."
        )
    features_BF = features_BF.to(torch.float64)
    mean_F = features_BF.mean(dim=0)
    if not torch.isfinite(mean_F).all():  # one bad value is enough for that
        bad = torch.nonzero(~torch.isfinite(features_BF).all(dim=1)).flatten().tolist()
        told = f"the first is sample {bad[0]}" if bad else "but their sum is not"
        raise NumericsError(
            f"{len(bad)} of {len(features_BF)} feature vectors are not finite, {told}; drop such "
            "samples before computing moments."
        )
    centred_BF = features_BF - mean_F
    # The mean's own rounding error leaves a residual; putting it back makes the mean exact to
    # the last digit, which a later merge of many batches relies on.
    residual_F = centred_BF.mean(dim=0)
    centred_BF -= residual_F
    cov_FF = _gram(centred_BF) / features_BF.shape[0]
    return Moments(float(features_BF.shape[0]), mean_F + residual_F, cov_FF)


def _gram(rows_BF: Tensor) -> Tensor:
    """X^T X; of many columns only the lower blocks are computed."""
    num_columns = rows_BF.shape[1]
    if num_columns <= _BLOCK:
        return rows_BF.T @ rows_BF
    gram_FF = rows_BF.new_empty(num_columns, num_columns)
    for first in range(0, num_columns, _BLOCK):
        last = min(first + _BLOCK, num_columns)
        strip = rows_BF[:, first:last].T @ rows_BF[:, :last]
        gram_FF[first:last, :last] = strip
        gram_FF[:first, first:last] = strip[:, :first].T
    return gram_FF


def merge(a: Moments, b: Moments) -> Moments:
    """Combine the moments of two disjoint sets of samples.

    cov = p_a cov_a + p_b cov_b + p_a p_b (mean_a - mean_b)(mean_a - mean_b)^T with the shares
    p = count / total: exact, so any order and any split gives the same moments.

    Args:
        a: moments over F dimensions.
        b: moments over the same F dimensions, on the same device.
    Returns:
        Moments of the union.
    Raises:
        NumericsError: the dimensions differ, or both sets are empty.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm" (1979).
    """
    if a.mean_F.shape != b.mean_F.shape:
        raise NumericsError(
            f"can't merge moments over {a.mean_F.numel()} and {b.mean_F.numel()} dimensions; "
            "use features of one feature space."
        )
    total = a.count + b.count
    if total <= 0:
        raise NumericsError(f"can't merge moments of {a.count:g} and {b.count:g} samples.")
    share_a, share_b = a.count / total, b.count / total
    gap_F = b.mean_F - a.mean_F
    cov_FF = share_a * a.cov_FF + share_b * b.cov_FF
    cov_FF = torch.addr(cov_FF, gap_F, gap_F, alpha=share_a * share_b)
    return Moments(total, a.mean_F + share_b * gap_F, cov_FF)
