"""Leave-one-out rewards of the published, diagonal Frechet distance.

Owns the closed form for covariances restricted to their diagonals; leave_one_out.py has the
full one. Must not know about quadrature.

Shapes: N samples, F feature dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlgen.moments.coordinates import ReferenceCoordinates
from rlgen.moments.ema import EmaState, EmaStep


def diagonal_distance(
    state: EmaState, reference: ReferenceCoordinates, *, scale: float = 1.0
) -> float:
    """Compute sum_j (mean_j - mean_rj)^2 + (std_j - std_rj)^2.

    Args:
        state: moments over F dimensions.
        reference: the reference over the same dimensions, not truncated.
        scale: factor of the state's variance (1 is biased).
    Returns:
        The distance in squared feature units.
    """
    gap_F = state.mean_F - reference.mean_F
    spread_F = (scale * state.var_F).sqrt() - reference.std_F
    return float(gap_F @ gap_F + spread_F @ spread_F)


def diagonal_rewards(
    step: EmaStep,
    reference: ReferenceCoordinates,
    *,
    decay: float,
    scale: float = 1.0,
    loo_scale: float = 1.0,
) -> Tensor:
    """Compute the diagonal distance without each sample less that with all.

    With c = (1 - rho) / (N - 1), h_i the deviation from the batch mean and gbar = rho gap /
    (1 + c): mean_{-i} = mean' - c h_i and var_{-i} = var' + c var_b - c (1 + c)
    (h_i^2 + 2 h_i gbar), in every dimension.

    Args:
        step: the EMA step over N >= 2 samples.
        reference: the reference, not truncated.
        decay: rho of the step.
        scale: factor of the variances with all samples (1 is biased).
        loo_scale: the same for those without one.
    Returns:
        [N] float64, squared feature units; positive where the sample brings the moments closer.
    Source: arXiv:2603.23086.
    """
    h_NF = step.deviations_NF
    c = (1.0 - decay) / (h_NF.shape[0] - 1)
    kappa = c * (1.0 + c)
    gbar_F = decay / (1.0 + c) * step.gap_F
    offset_F = step.state.mean_F - reference.mean_F
    mean_N = c * c * h_NF.square().sum(dim=1) - 2 * c * (h_NF @ offset_F)
    var_F = step.state.var_F
    change_NF = c * step.batch_var_F - kappa * h_NF * (h_NF + 2 * gbar_F)
    loo_var_NF = (loo_scale * (var_F + change_NF)).clamp(min=0.0)
    change_NF = loo_scale * change_NF + (loo_scale - scale) * var_F
    std_sum_NF = loo_var_NF.sqrt() + (scale * var_F).sqrt()
    # std' - std as a quotient, without cancellation; a dead dimension has 0 / 0 and changes by 0.
    std_change_NF = torch.where(std_sum_NF > 0, change_NF / std_sum_NF, 0.0)
    return mean_N + change_NF.sum(dim=1) - 2 * (std_change_NF @ reference.std_F)
