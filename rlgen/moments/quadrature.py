"""Quadrature nodes for differences of matrix square-root traces.

Owns the rule behind sqrt(x) = (1/pi) int_0^inf log(1 + x / s^2) ds. Must not know about
features or rewards.

The substitution s = sqrt(m) sc(u) and the midpoint rule in u give the optimal rational
approximation of lambda^(-1/2) on [m, M]: with eps = 4 exp(-2 pi^2 Q / log(16 M / m)) the error
of a difference delta of square-root traces is at most eps |delta| + sqrt(m) for any spectrum
below M, whatever lies below m.

Shapes: Q nodes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SPECTRUM_RATIO = 1e-16
"""m / M: square roots of eigenvalues below m vanish against float64 rounding."""
RELATIVE_ERROR = 1e-10
"""Of delta; centred rewards have 40 to 200 times that, in units of their deviation."""


def num_nodes(ratio: float, relative_error: float) -> int:
    """Count the nodes that reach a relative error.

    Args:
        ratio: m / M, in (0, 1).
        relative_error: of a difference of square-root traces, in (0, 1).
    Returns:
        The smallest sufficient number of nodes.
    """
    return math.ceil(math.log(16 / ratio) * math.log(4 / relative_error) / (2 * math.pi**2))


@lru_cache(maxsize=16)
def unit_nodes(ratio: float, count: int) -> tuple[Tensor, Tensor]:
    """Compute the nodes and weights of the rule for M = 1; cached, don't write to them.

    Args:
        ratio: m / M, in [1e-18, 1).
        count: number of nodes Q.
    Returns:
        ([Q] nodes s, [Q] weights omega), float64 on the CPU, both ascending; for another M
        multiply both by sqrt(M).
    Source: Hale, Higham, Trefethen, "Computing A^alpha, log(A), and related matrix functions
        by contour integrals" (2008), method 3; elliptic functions by descending Landen
        (Abramowitz and Stegun 16.4), which keeps its digits where 1 - ratio rounds to 1.
    """
    kc = math.sqrt(ratio)
    a, b, c = [1.0], kc, [math.sqrt(1 - ratio)]
    while c[-1] > 1e-16:
        a_next, c_next = (a[-1] + b) / 2, (a[-1] - b) / 2
        b = math.sqrt(a[-1] * b)
        a.append(a_next)
        c.append(c_next)
    quarter_period = math.pi / (2 * a[-1])
    u_Q = (np.arange(count) + 0.5) * quarter_period / count
    is_low_Q = u_Q <= quarter_period / 2
    # The upper half by reflection, so that neither sn nor cn is the difference of close numbers.
    phi_Q = 2.0 ** (len(a) - 1) * a[-1] * np.where(is_low_Q, u_Q, quarter_period - u_Q)
    for a_n, c_n in zip(a[:0:-1], c[:0:-1], strict=True):
        phi_Q = (phi_Q + np.arcsin(c_n / a_n * np.sin(phi_Q))) / 2
    sn_Q, cn_Q = np.sin(phi_Q), np.cos(phi_Q)
    dn_Q = np.sqrt(cn_Q**2 + ratio * sn_Q**2)
    step = quarter_period / count
    s_Q = np.where(is_low_Q, kc * sn_Q / cn_Q, cn_Q / sn_Q)
    omega_Q = step * dn_Q * np.where(is_low_Q, kc / cn_Q**2, 1 / sn_Q**2)
    return torch.from_numpy(s_Q), torch.from_numpy(omega_Q)


def nodes(largest: float) -> tuple[Tensor, Tensor]:
    """Scale the default rule to a spectrum.

    Args:
        largest: an upper bound M of the eigenvalues, > 0.
    Returns:
        ([Q] nodes, [Q] weights) float64 on the CPU, in units of sqrt(M).
    """
    s_Q, omega_Q = unit_nodes(SPECTRUM_RATIO, num_nodes(SPECTRUM_RATIO, RELATIVE_ERROR))
    scale = math.sqrt(largest)
    return s_Q * scale, omega_Q * scale
