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
RELATIVE_ERROR = 1e-12
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
        by contour integrals" (2008), method 3.
    """
    kc = math.sqrt(ratio)
    quarter_period = math.pi / (2 * _agm(1.0, kc))
    step = quarter_period / count
    u_Q = (np.arange(count) + 0.5) * step
    # The upper half by reflection: sc(K - u) = 1 / (kc sc(u)).
    is_low_Q = u_Q <= quarter_period / 2
    sc_Q = _sc(np.where(is_low_Q, u_Q, quarter_period - u_Q), kc)
    slope_Q = step * np.sqrt((1 + ratio * sc_Q**2) * (1 + sc_Q**2))
    s_Q = np.where(is_low_Q, kc * sc_Q, 1 / sc_Q)
    omega_Q = slope_Q * np.where(is_low_Q, kc, 1 / sc_Q**2)
    return torch.from_numpy(s_Q), torch.from_numpy(omega_Q)


def _agm(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _sc(u_Q: np.ndarray, kc: float) -> np.ndarray:
    """Jacobi's sc = sn / cn of complementary modulus kc, for u up to half the quarter period.

    sc(u, k') = -i sn(i u, kc), and descending Landen steps bring kc to 0, where it is sinh. The
    modulus k' itself, which rounds to 1, is never used: relative accuracy at every u.
    """
    modulus, moduli = kc, []
    while modulus > 1e-17:
        modulus = (modulus / (1 + math.sqrt((1 - modulus) * (1 + modulus)))) ** 2
        moduli.append(modulus)
        u_Q = u_Q / (1 + modulus)
    sc_Q = np.sinh(u_Q)
    for modulus in reversed(moduli):
        sc_Q = (1 + modulus) * sc_Q / (1 - modulus * sc_Q**2)
    return sc_Q


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
