"""Square-root traces of many rank-one downdates of one matrix.

Owns delta_i = tr sqrt(M - kappa w_i w_i^T) - tr sqrt(M) for all samples at the cost of about one
factorisation of M. By the matrix determinant lemma and sqrt(x) = (1/pi) int log(1 + x/s^2) ds,
    delta_i = (1/pi) int_0^inf log x_i(s) ds,   x_i(s) = 1 - kappa w_i^T (M + s^2)^-1 w_i
Eigenvalues interlace, so s^2 / (s^2 + lambda_max) <= x_i(s) <= 1; rounding is clipped to that.
Must not know about features, rewards or EMA.

Shapes: N samples, R dimension of M, J kept eigenvalues, Q nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from rlgen.errors import NumericsError
from rlgen.moments.quadrature import nodes

Method = Literal["eigh", "tridiagonal"]

RELATIVE_FLOOR = 1e-15
"""Eigenvalues below this share of the largest are rounding; a higher floor costs accuracy."""
SAMPLES_PER_CHUNK = 256
"""In the tridiagonal recurrence: [Q, chunk] buffers of 100 kB stay in the second-level cache."""


@dataclass(frozen=True, eq=False)
class Downdates:
    """Changes of the square-root trace."""

    delta_N: Tensor
    """[N] float64, <= 0."""
    sqrt_trace: float
    """tr sqrt(M)."""
    guard_fraction: float
    """Share of the samples for which rounding broke the lower bound; 0 for full-rank M."""


def downdate(matrix_RR: Tensor, vectors_NR: Tensor, kappa: float, *, method: Method) -> Downdates:
    """Compute all downdates of a matrix.

    Args:
        matrix_RR: [R, R] float64, symmetric positive semidefinite.
        vectors_NR: [N, R] float64, each M - kappa w w^T positive semidefinite.
        kappa: > 0.
        method: "eigh" on the device of the matrix; "tridiagonal" by LAPACK on the CPU, without
            eigenvectors: four to eight times cheaper there.
    Returns:
        Downdates on the device of the vectors.
    """
    if method == "eigh" or matrix_RR.shape[0] < 3:
        return _downdate_eigh(matrix_RR, vectors_NR, kappa)
    return _downdate_tridiagonal(matrix_RR, vectors_NR, kappa)


def downdate_gram(deviations_NR: Tensor) -> Downdates:
    """Compute the downdates of a batch covariance by each of its samples, in sample space.

    M = H^T H / (N-1), w_i = h_i and kappa = N / (N-1)^2: leaving sample i out of a batch without
    history. The Gram matrix H H^T has the same eigenvalues, and kappa (w_i . U_j)^2 / lambda_j =
    N / (N-1) P_ij^2 with its eigenvectors P, so a rank of N - 1 below R costs no accuracy.

    Args:
        deviations_NR: [N, R] float64, rows h_i sum to 0, N >= 2.
    Returns:
        Downdates on the device of the deviations.
    """
    num = deviations_NR.shape[0]
    # H 1 = 0 is taken out exactly by a Householder reflection that maps 1 / sqrt(N) to -e_1:
    # the eigenvectors are then orthogonal to 1 to the last digit, whatever else is singular.
    mirror_N = torch.full((num,), num**-0.5, dtype=torch.float64, device=deviations_NR.device)
    mirror_N[0] += 1.0
    mirror_N /= mirror_N.norm()
    reflected_NR = deviations_NR - 2 * torch.outer(mirror_N, mirror_N @ deviations_NR)
    contrasts_MR = reflected_NR[1:]  # M = N - 1
    lambda_M, inner_MM = torch.linalg.eigh(contrasts_MR @ contrasts_MR.T / (num - 1))
    largest = float(lambda_M[-1])
    if largest <= 0:
        return _no_change(deviations_NR)
    outer_NM = torch.cat([torch.zeros_like(inner_MM[:1]), inner_MM])
    vectors_NM = outer_NM - 2 * torch.outer(mirror_N, mirror_N @ outer_NM)
    keep_M = lambda_M > RELATIVE_FLOOR * largest
    share_NJ = (num / (num - 1) * vectors_NM[:, keep_M].square()).clamp(max=1.0)
    # Full rank N - 1: the share outside is exactly 0. Duplicates lower the rank and keep a share.
    rest_N = (1 - share_NJ.sum(dim=1)).clamp(min=0.0)
    if bool(keep_M.all()):
        rest_N = torch.zeros_like(rest_N)
    delta_N = _integrate(rest_N, share_NJ, lambda_M[keep_M], largest)
    return Downdates(delta_N, float(lambda_M[keep_M].sqrt().sum()), 0.0)


def sqrt_trace(matrix_RR: Tensor, *, method: Method) -> float:
    """Compute tr sqrt(M) from eigenvalues alone.

    Args:
        matrix_RR: [R, R] float64, symmetric positive semidefinite, R >= 1.
        method: as for downdate.
    Returns:
        The sum of the square roots of the eigenvalues; negative rounding counts as 0.
    """
    if method == "eigh" or matrix_RR.shape[0] < 3:
        return float(torch.linalg.eigvalsh(matrix_RR).clamp(min=0).sqrt().sum())
    _, diagonal_R, off_diagonal_R, _ = _tridiagonalise(matrix_RR)
    return _tridiagonal_sqrt_trace(diagonal_R, off_diagonal_R)


def _no_change(vectors_NR: Tensor) -> Downdates:
    return Downdates(torch.zeros_like(vectors_NR[:, 0]), 0.0, 0.0)


def _downdate_eigh(matrix_RR: Tensor, vectors_NR: Tensor, kappa: float) -> Downdates:
    lambda_R, eigenvectors_RR = torch.linalg.eigh(matrix_RR)
    largest = float(lambda_R[-1])
    if largest <= 0:
        return _no_change(vectors_NR)
    keep_R = lambda_R > RELATIVE_FLOOR * largest
    lambda_J = lambda_R[keep_R]
    projected_NJ = vectors_NR @ eigenvectors_RR[:, keep_R]
    share_NJ = (kappa * projected_NJ.square() / lambda_J).clamp(max=1.0)
    rest_N = 1 - share_NJ.sum(dim=1)
    guard_fraction = float((rest_N < 0).double().mean())
    delta_N = _integrate(rest_N.clamp(min=0.0), share_NJ, lambda_J, largest)
    return Downdates(delta_N, float(lambda_J.sqrt().sum()), guard_fraction)


def _integrate(rest_N: Tensor, share_NJ: Tensor, lambda_J: Tensor, largest: float) -> Tensor:
    """(1/pi) int log(rest + sum_j share_j s^2 / (lambda_j + s^2)) ds, without cancellation."""
    s_Q, omega_Q = (t.to(share_NJ.device) for t in nodes(largest))
    s2_Q = s_Q.square()
    x_NQ = rest_N[:, None] + share_NJ @ (s2_Q / (lambda_J[:, None] + s2_Q))
    x_NQ = torch.minimum(torch.maximum(x_NQ, s2_Q / (s2_Q + largest)), torch.ones_like(x_NQ))
    return x_NQ.log() @ omega_Q / math.pi


def _downdate_tridiagonal(matrix_RR: Tensor, vectors_NR: Tensor, kappa: float) -> Downdates:
    """M = Z T Z^T, then w^T (M + s^2)^-1 w from the L D L^T factors of T + s^2 at every node."""
    reflectors_RR, diagonal_R, off_diagonal_R, scales_R = _tridiagonalise(matrix_RR)
    largest = math.sqrt(float(diagonal_R @ diagonal_R + 2 * off_diagonal_R @ off_diagonal_R))
    if largest <= 0:
        return _no_change(vectors_NR)
    s_Q, omega_Q = nodes(largest)
    s2_Q = s_Q.square()
    rotated_RN = _apply_reflectors(reflectors_RR, scales_R, vectors_NR)
    factors = _ldl_factors(diagonal_R, off_diagonal_R, s2_Q.numpy())
    floor_Q = (s2_Q / (s2_Q + largest))[:, None]
    delta_N = torch.empty(vectors_NR.shape[0], dtype=torch.float64)
    num_guarded = 0
    for start in range(0, len(delta_N), SAMPLES_PER_CHUNK):
        chunk = slice(start, start + SAMPLES_PER_CHUNK)
        phi_QN = _quadratic_forms(rotated_RN[:, chunk].contiguous(), *factors)
        x_QN = 1 - kappa * phi_QN
        num_guarded += int((x_QN < floor_Q).any(dim=0).sum())
        delta_N[chunk] = omega_Q @ torch.maximum(x_QN, floor_Q).log_() / math.pi
    return Downdates(
        delta_N.to(vectors_NR.device),
        _tridiagonal_sqrt_trace(diagonal_R, off_diagonal_R),
        num_guarded / max(len(delta_N), 1),
    )


def _tridiagonalise(matrix_RR: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """LAPACK dsytrd from the first column, which suits a matrix graded from large to small."""
    # A row-major symmetric matrix transposed is the column-major one that LAPACK wants.
    matrix = matrix_RR.detach().cpu().numpy().T
    work, info = lapack.dsytrd_lwork(matrix.shape[0], lower=1)
    if info == 0:
        reflectors, diagonal, off_diagonal, scales, info = lapack.dsytrd(
            matrix, lower=1, lwork=int(work)
        )
    if info != 0:
        raise NumericsError(f"LAPACK dsytrd failed with info = {info}; use method='eigh'.")
    return reflectors, diagonal, off_diagonal, scales


def _apply_reflectors(reflectors_RR: np.ndarray, scales_R: np.ndarray, w_NR: Tensor) -> Tensor:
    """[R, N] Z^T w_i; the reflectors of dsytrd are those of a QR below the first row."""
    w_RN = w_NR.detach().cpu().numpy().T
    below = np.asfortranarray(reflectors_RR[1:, :-1])
    query = lapack.dormqr("L", "T", below, scales_R, w_RN[1:], -1)
    rotated, _, info = lapack.dormqr("L", "T", below, scales_R, w_RN[1:], int(query[1][0]))
    if info != 0:
        raise NumericsError(f"LAPACK dormqr failed with info = {info}; use method='eigh'.")
    return torch.from_numpy(np.concatenate([w_RN[:1], rotated]))


def _tridiagonal_sqrt_trace(diagonal_R: np.ndarray, off_diagonal_R: np.ndarray) -> float:
    eigenvalues_R, info = lapack.dsterf(diagonal_R, off_diagonal_R)
    if info != 0:
        raise NumericsError(f"LAPACK dsterf failed with info = {info}; use method='eigh'.")
    return float(np.sqrt(np.maximum(eigenvalues_R, 0.0)).sum())


def _ldl_factors(
    diagonal_R: np.ndarray, off_diagonal_R: np.ndarray, s2_Q: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Factor T + s^2 = L D L^T at all nodes: [R, Q, 1] of -L_{j,j-1} and of 1 / D_j."""
    minus_l_RQ = np.zeros((len(diagonal_R), len(s2_Q)))
    inverse_d_RQ = np.empty_like(minus_l_RQ)
    # Exactly D_j >= s^2; half of it leaves room for rounding where T is singular.
    floor_Q = s2_Q / 2
    d_Q = np.maximum(diagonal_R[0] + s2_Q, floor_Q)
    inverse_d_RQ[0] = 1 / d_Q
    for j in range(1, len(diagonal_R)):
        off = off_diagonal_R[j - 1]
        l_Q = off / d_Q
        d_Q = np.maximum(diagonal_R[j] + s2_Q - l_Q * off, floor_Q)
        minus_l_RQ[j] = -l_Q
        inverse_d_RQ[j] = 1 / d_Q
    return torch.from_numpy(minus_l_RQ)[:, :, None], torch.from_numpy(inverse_d_RQ)[:, :, None]


def _quadratic_forms(w_RN: Tensor, minus_l_RQ1: Tensor, inverse_d_RQ1: Tensor) -> Tensor:
    """[Q, N] w^T (T + s^2)^-1 w = sum_j y_j^2 / D_j with L y = w, over all samples and nodes."""
    y_QN = torch.zeros(minus_l_RQ1.shape[1], w_RN.shape[1], dtype=torch.float64)
    phi_QN, scaled_QN = torch.zeros_like(y_QN), torch.empty_like(y_QN)
    for w_N, minus_l_Q1, inverse_d_Q1 in zip(
        w_RN.unbind(), minus_l_RQ1.unbind(), inverse_d_RQ1.unbind(), strict=True
    ):
        torch.addcmul(w_N, y_QN, minus_l_Q1, out=y_QN)
        torch.mul(y_QN, inverse_d_Q1, out=scaled_QN)
        phi_QN.addcmul_(y_QN, scaled_QN)
    return phi_QN
