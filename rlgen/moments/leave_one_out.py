"""Leave-one-out Frechet rewards: what each sample does for the distance to a reference.

Owns the exact reward with full covariance. r_i = FID(EMA step without sample i) - FID(EMA step
with all), positive if the sample brings the moments closer. With c = (1 - rho) / (N - 1), kappa
= c (1 + c), h_i the deviation from the batch mean, gap = batch mean - old mean and gbar = rho
gap / (1 + c), leaving a sample out is an exact rank-one downdate of one matrix for all:
    mean_{-i} = mean' - c h_i
    C_{-i}    = B - kappa g_i g_i^T,   g_i = h_i + gbar,   B = C' + c C_b + kappa gbar gbar^T
The reward is then assembled from small terms only; no two distances are subtracted. Must not
know about groups, other rewards or the policy. With samples on several devices, gather the
features first: N is the number of samples of the whole step.

Shapes: B samples, N valid samples, F feature dimensions, R reference components, K measured
dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.moments.coordinates import ReferenceCoordinates
from rlgen.moments.diagonal import diagonal_distance, diagonal_rewards
from rlgen.moments.downdate import Downdates, Method, downdate, downdate_gram, sqrt_trace
from rlgen.moments.ema import EmaState, EmaStep, check_features, ema_step

TRIDIAGONAL_FROM = 512
"""Reference components from which the tridiagonal method is the faster one on a CPU."""


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Rewards of a step and the moments after it; rejected samples have reward 0."""

    rewards_B: Tensor
    """[B] float64, squared feature units, scale (1 - rho) / N; up to one constant if not
    absolute."""
    centred_B: Tensor
    """[B] float64, rewards less their mean over the valid samples."""
    influence_B: Tensor
    """[B] float64, centred / c: of a scale that doesn't depend on N and rho."""
    state: EmaState
    """The moments with all valid samples: the state of the next step."""
    fid: float | None
    """Frechet distance of that state; None if not absolute."""
    n_eff: float
    """Effective number of samples in that state."""
    valid_B: Tensor
    """[B] bool, False where features were not finite and the sample was rejected."""
    guard_fraction: float
    """Share of the valid samples for which rounding broke a bound; 0 for full-rank moments."""


def leave_one_out(
    state: EmaState,
    features_BF: Tensor,
    reference: ReferenceCoordinates,
    *,
    decay: float,
    covariance: Literal["full", "diagonal"] = "full",
    unbiased: bool = False,
    method: Literal["auto", "eigh", "tridiagonal"] = "auto",
    absolute: bool = True,
) -> LeaveOneOut:
    """Take an EMA step and reward each sample by what it does for the Frechet distance.

    Fewer than two valid samples, or equal ones, get rewards of exactly 0; the moments are
    updated all the same. Without history (decay 0) and N - 1 <= R the sample space is used.

    Args:
        state: moments before the step.
        features_BF: [B, F] of any float type, all samples of the step.
        reference: the reference that the state was made with; gives the device.
        decay: rho in [0, 1), see rho_eff for a state that began empty.
        covariance: "full", or "diagonal" for the published distance of marginals.
        unbiased: weighted counterpart of divisor n - 1 for the policy's covariances (biased for
            a step where it is undefined); the reference is used as given.
        method: factorisation for "full"; "auto" is "tridiagonal" for large matrices on a CPU.
        absolute: whether to compute the constant common to all rewards, and the distance; costs
            a second, eigenvalue-only factorisation. "diagonal" has both for nothing.
    Returns:
        LeaveOneOut on the device of the reference.
    Raises:
        ConfigError: decay out of range, shapes that don't fit, or "diagonal" with a truncated
            reference.
        NumericsError: moments overflow.
    Source: the reward, for diagonal covariances, arXiv:2603.23086; matrix determinant lemma.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"decay = {decay}; use 0 <= decay < 1.")
    if covariance == "diagonal" and reference.is_truncated:
        raise ConfigError(
            "covariance = diagonal needs all dimensions, but the reference is truncated to "
            f"{len(reference.eigenvalues_R)} components; use covariance = full or drop the limit."
        )
    chosen = _choose_method(method, reference)
    valid_B = check_features(features_BF, reference).to(reference.mean_F.device)
    num = int(valid_B.sum())
    if num == 0:
        fid = _distance(state, reference, covariance, chosen, unbiased) if absolute else None
        return _result(valid_B, None, state, fid, decay, 0.0)
    features_NF = features_BF.to(reference.mean_F.device)[valid_B]
    step = ema_step(state, features_NF, reference, decay=decay)
    if num == 1 or not bool(step.deviations_NF.any()):
        fid = _distance(step.state, reference, covariance, chosen, unbiased) if absolute else None
        return _result(valid_B, None, step.state, fid, decay, 0.0)
    scale, loo_scale = _covariance_scales(state, step, decay=decay, unbiased=unbiased)
    fid = None
    guard_fraction = 0.0
    if covariance == "diagonal":
        rewards_N = diagonal_rewards(step, reference, decay=decay, scale=scale, loo_scale=loo_scale)
        if absolute:
            fid = diagonal_distance(step.state, reference, scale=scale)
    else:
        downdates = _downdates(step, decay=decay, method=chosen)
        guard_fraction = downdates.guard_fraction
        rewards_N = _sample_terms(step, reference, downdates, decay=decay, loo_scale=loo_scale)
        if absolute:
            cross = _cross_term(step, downdates, decay=decay, method=chosen)
            rewards_N = rewards_N + _common_terms(
                step, reference, downdates.sqrt_trace, cross, decay, scale, loo_scale
            )
            fid = _assemble(step.state, reference, cross, scale)
    return _result(valid_B, rewards_N, step.state, fid, decay, guard_fraction)


def _choose_method(
    method: Literal["auto", "eigh", "tridiagonal"], reference: ReferenceCoordinates
) -> Method:
    if method != "auto":
        return method
    is_large = len(reference.eigenvalues_R) >= TRIDIAGONAL_FROM
    return "tridiagonal" if is_large and reference.mean_F.device.type == "cpu" else "eigh"


def _covariance_scales(
    before: EmaState, step: EmaStep, *, decay: float, unbiased: bool
) -> tuple[float, float]:
    """1 / (1 - sum of squared weights) with all samples and without one: the same for each."""
    num = step.deviations_NF.shape[0]
    loo_s2 = decay**2 * before.sum_sq_weights + (1 - decay) ** 2 / (num - 1)
    if not unbiased or loo_s2 >= 1:
        return 1.0, 1.0
    return 1 / (1 - step.state.sum_sq_weights), 1 / (1 - loo_s2)


def _factors(num: int, decay: float) -> tuple[float, float]:
    """c and kappa = c (1 + c)."""
    c = (1.0 - decay) / (num - 1)
    return c, c * (1.0 + c)


def _downdates(step: EmaStep, *, decay: float, method: Method) -> Downdates:
    num, rank = step.deviations_NR.shape
    if rank == 0:
        return Downdates(torch.zeros_like(step.deviations_NF[:, 0]), 0.0, 0.0)
    if decay == 0 and num - 1 <= rank:
        return downdate_gram(step.deviations_NR)
    c, kappa = _factors(num, decay)
    gbar_R = decay / (1.0 + c) * step.gap_R
    upper_RR = torch.add(step.state.cov_RR, step.batch_cov_RR, alpha=c)
    upper_RR.addr_(gbar_R, gbar_R, alpha=kappa)
    return downdate(upper_RR, step.deviations_NR + gbar_R, kappa, method=method)


def _sample_terms(
    step: EmaStep,
    reference: ReferenceCoordinates,
    downdates: Downdates,
    *,
    decay: float,
    loo_scale: float,
) -> Tensor:
    """The part of the rewards that differs between samples."""
    c, kappa = _factors(step.deviations_NF.shape[0], decay)
    h_NK = reference.measured(step.deviations_NF, step.deviations_NR)
    gap_K = reference.measured(step.gap_F[None], step.gap_R[None])[0]
    offset_K = _offset(step.state, reference)
    square_N = h_NK.square().sum(dim=1)
    mean_N = c * c * square_N - 2 * c * (h_NK @ offset_K)
    trace_N = -kappa * (square_N + 2 * decay / (1.0 + c) * (h_NK @ gap_K))
    return mean_N + loo_scale * trace_N - 2 * math.sqrt(loo_scale) * downdates.delta_N


def _cross_term(step: EmaStep, downdates: Downdates, *, decay: float, method: Method) -> float:
    """tr sqrt(L^T C' L) with all samples."""
    num, rank = step.deviations_NR.shape
    if rank == 0:
        return 0.0
    if decay == 0:
        # Without history B = N / (N - 1) C'.
        return math.sqrt((num - 1) / num) * downdates.sqrt_trace
    return sqrt_trace(step.state.cov_RR, method=method)


def _common_terms(
    step: EmaStep,
    reference: ReferenceCoordinates,
    upper_cross: float,
    cross: float,
    decay: float,
    scale: float,
    loo_scale: float,
) -> float:
    """The constant that all rewards share."""
    c, _ = _factors(step.deviations_NF.shape[0], decay)
    h_NK = reference.measured(step.deviations_NF, step.deviations_NR)
    batch_trace = float(h_NK.square().sum()) / h_NK.shape[0]
    trace = (loo_scale - scale) * step.state.trace(reference) + loo_scale * c * batch_trace
    return trace - 2 * (math.sqrt(loo_scale) * upper_cross - math.sqrt(scale) * cross)


def _offset(state: EmaState, reference: ReferenceCoordinates) -> Tensor:
    """[K] mean less the reference's."""
    offset_F = state.mean_F - reference.mean_F
    return reference.measured(offset_F[None], reference.map(offset_F[None]))[0]


def _assemble(
    state: EmaState, reference: ReferenceCoordinates, cross: float, scale: float
) -> float:
    offset_K = _offset(state, reference)
    trace = scale * state.trace(reference) + reference.trace
    return float(offset_K @ offset_K) + trace - 2 * math.sqrt(scale) * cross


def _distance(
    state: EmaState,
    reference: ReferenceCoordinates,
    covariance: Literal["full", "diagonal"],
    method: Method,
    unbiased: bool,
) -> float:
    """Frechet distance of a state, for steps without rewards."""
    is_defined = unbiased and state.sum_sq_weights < 1
    scale = 1 / (1 - state.sum_sq_weights) if is_defined else 1.0
    if covariance == "diagonal":
        return diagonal_distance(state, reference, scale=scale)
    has_components = len(reference.eigenvalues_R) > 0
    cross = sqrt_trace(state.cov_RR, method=method) if has_components else 0.0
    return _assemble(state, reference, cross, scale)


def _result(
    valid_B: Tensor,
    rewards_N: Tensor | None,
    state: EmaState,
    fid: float | None,
    decay: float,
    guard_fraction: float,
) -> LeaveOneOut:
    """Put the rewards of the valid samples in their places; None gives zeros."""
    rewards_B = torch.zeros(len(valid_B), dtype=torch.float64, device=valid_B.device)
    centred_B, influence_B = rewards_B.clone(), rewards_B.clone()
    if rewards_N is not None:
        c, _ = _factors(len(rewards_N), decay)
        rewards_B[valid_B] = rewards_N
        centred_B[valid_B] = rewards_N - rewards_N.mean()
        influence_B = centred_B / c
    return LeaveOneOut(
        rewards_B=rewards_B,
        centred_B=centred_B,
        influence_B=influence_B,
        state=state,
        fid=fid,
        n_eff=state.n_eff,
        valid_B=valid_B,
        guard_fraction=guard_fraction,
    )
