"""Distance of one batch, without any history, to the reference.

Owns what tells the policy of this step apart from its moving average: the average's distance can
fall while the policy's rises. Must not know about rewards.

Shapes: N samples, F feature dimensions, R reference components.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlgen.moments.coordinates import ReferenceCoordinates
from rlgen.moments.downdate import sqrt_trace
from rlgen.moments.leave_one_out import TRIDIAGONAL_FROM


def batch_distance(
    features_NF: Tensor,
    reference: ReferenceCoordinates,
    *,
    covariance: Literal["full", "diagonal"] = "full",
) -> float:
    """Compute the Frechet distance between the biased moments of a batch and the reference.

    tr sqrt(L^T C L) has the same non-zero eigenvalues as a Gram matrix of N samples: with N <= R
    that costs a small part of a leave-one-out step. Biased upwards by about b / N, and strongly
    so for N below F: comparable between batches of one size only.

    Args:
        features_NF: [N, F] of any float type, finite, N >= 1.
        reference: the reference; gives the device.
        covariance: as for leave_one_out.
    Returns:
        The distance in squared feature units.
    """
    centred_NF = features_NF.to(reference.mean_F) - reference.mean_F
    offset_F = centred_NF.mean(dim=0)
    deviations_NF = centred_NF - offset_F
    if covariance == "diagonal":
        var_F = deviations_NF.square().mean(dim=0)
        return float(offset_F @ offset_F + (var_F.sqrt() - reference.std_F).square().sum())
    mapped_NR = reference.map(deviations_NF)
    num, rank = mapped_NR.shape
    cross = 0.0
    if rank > 0:
        is_wide = num <= rank
        product = mapped_NR @ mapped_NR.T if is_wide else mapped_NR.T @ mapped_NR
        is_large = len(product) >= TRIDIAGONAL_FROM and product.device.type == "cpu"
        cross = sqrt_trace(product / num, method="tridiagonal" if is_large else "eigh")
    gap_K = reference.measured(offset_F[None], reference.map(offset_F[None]))[0]
    spread_NK = reference.measured(deviations_NF, mapped_NR)
    trace = float(spread_NK.square().sum()) / num
    return float(torch.dot(gap_K, gap_K)) + trace + reference.trace - 2 * cross
