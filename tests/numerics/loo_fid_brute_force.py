"""The leave-one-out reward straight from its definition, for tests only.

Every sample ever seen is a row with an explicit weight. The cross term is the sum of singular
values of the weighted, centred rows times L: no square root of a rounded eigenvalue, so the
definition stays accurate to about 1e-15 even where moments are singular.

Shapes: H rows seen before the step, N samples of the step, A all rows, F dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlgen.moments.reference import ReferenceMoments


def reference_of(features_BF: Tensor, *, singular_rank: int | None = None) -> ReferenceMoments:
    """Reference moments of rows; optionally projected to a rank, with a null space."""
    mean_F = features_BF.mean(dim=0)
    rows_BF = features_BF - mean_F
    if singular_rank is not None:
        basis_FR = torch.linalg.qr(rows_BF[: features_BF.shape[1]].T).Q[:, :singular_rank]
        rows_BF = rows_BF @ basis_FR @ basis_FR.T
    count = features_BF.shape[0]
    return ReferenceMoments("test", count, mean_F, rows_BF.T @ rows_BF / count)


def distance(
    rows_AF: Tensor,
    weights_A: Tensor,
    reference: ReferenceMoments,
    *,
    unbiased: bool = False,
    diagonal: bool = False,
) -> float:
    """Frechet distance of weighted rows; weights sum to 1."""
    scale = 1 / (1 - float(weights_A.square().sum())) if unbiased else 1.0
    mean_F = weights_A @ rows_AF
    weighted_AF = (scale * weights_A).sqrt()[:, None] * (rows_AF - mean_F)
    gap_F = mean_F - reference.mean_F
    if diagonal:
        std_F = weighted_AF.square().sum(dim=0).sqrt()
        return float(gap_F @ gap_F + (std_F - reference.cov_FF.diagonal().sqrt()).square().sum())
    values_F, vectors_FF = torch.linalg.eigh(reference.cov_FF)
    values_F = values_F.clamp(min=0) * (values_F > 1e-13 * values_F[-1])
    factor_FF = vectors_FF * values_F.sqrt()
    cross = torch.linalg.svdvals(weighted_AF @ factor_FF).sum()
    trace = weighted_AF.square().sum() + reference.cov_FF.trace()
    return float(gap_F @ gap_F + trace - 2 * cross)


def rewards(
    history_HF: Tensor,
    weights_H: Tensor,
    batch_NF: Tensor,
    reference: ReferenceMoments,
    *,
    decay: float,
    unbiased: bool = False,
    diagonal: bool = False,
) -> tuple[Tensor, float]:
    """[N] distance without each sample less that with all, and the latter."""
    num = batch_NF.shape[0]
    loo_s2 = decay**2 * float(weights_H.square().sum()) + (1 - decay) ** 2 / (num - 1)
    options = {"unbiased": unbiased and loo_s2 < 1, "diagonal": diagonal}

    def after(rows_NF: Tensor) -> float:
        shares_N = torch.full((len(rows_NF),), (1 - decay) / len(rows_NF), dtype=torch.float64)
        rows_AF = torch.cat([history_HF, rows_NF])
        weights_A = torch.cat([decay * weights_H, shares_N])
        return distance(rows_AF, weights_A, reference, **options)

    full = after(batch_NF)
    kept = [torch.cat([batch_NF[:i], batch_NF[i + 1 :]]) for i in range(num)]
    return torch.tensor([after(rows) for rows in kept], dtype=torch.float64) - full, full
