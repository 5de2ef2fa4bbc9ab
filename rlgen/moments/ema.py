"""Exponential moving moments of the policy's features, and one step of them.

Owns the EMA state, its ways to start and its recursion. Must not know about rewards.

The recursion on raw moments, m <- rho m + (1 - rho) batch mean, is carried out on centred ones:
    C <- rho C + (1 - rho) C_b + rho (1 - rho) gap gap^T,   gap = batch mean - old mean
so that no large raw moments are subtracted. The covariance is kept in reference coordinates
only; the distance never needs it in the original ones.

Shapes: B samples, N valid samples, F feature dimensions, R reference components, K measured
dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import CheckpointError, ConfigError, NumericsError
from rlgen.moments.coordinates import ReferenceCoordinates


@dataclass(frozen=True, eq=False)
class EmaState:
    """Debiased exponential moving moments; bound to the reference it was made with."""

    mean_F: Tensor
    """[F] float64, original coordinates."""
    var_F: Tensor
    """[F] float64, biased variance of each original dimension."""
    cov_RR: Tensor
    """[R, R] float64, biased covariance in reference coordinates."""
    sum_sq_weights: float
    """Sum of the squared sample weights; 1 / it is the effective number of samples."""
    num_updates: int
    """Steps taken; input of rho_eff for a state that began empty."""

    @property
    def n_eff(self) -> float:
        """Effective number of samples; 0 for an empty state."""
        return 1.0 / self.sum_sq_weights if self.sum_sq_weights > 0 else 0.0

    def trace(self, reference: ReferenceCoordinates) -> float:
        """Trace of the covariance in the measured dimensions of a reference."""
        if reference.is_truncated:
            return float((self.cov_RR.diagonal() / reference.eigenvalues_R).sum())
        return float(self.var_F.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers under the field names, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(
        cls, values: Mapping[str, Any], reference: ReferenceCoordinates
    ) -> EmaState:
        """Restore a state.

        Args:
            values: what state_dict returned.
            reference: the same reference as when it was saved; gives device and shapes.
        Returns:
            The state, equal to the bit.
        Raises:
            CheckpointError: keys or shapes don't fit this reference.
        """
        names = [field.name for field in fields(cls)]
        if sorted(values) != sorted(names):
            raise CheckpointError(
                f"an EMA state has the entries {sorted(names)}, found {sorted(values)}; restore "
                "from a checkpoint of this version."
            )
        width, rank = reference.components_FR.shape
        shapes = {"mean_F": (width,), "var_F": (width,), "cov_RR": (rank, rank)}
        for name, shape in shapes.items():
            if tuple(values[name].shape) != shape:
                raise CheckpointError(
                    f"EMA state {name} has shape {list(values[name].shape)}, the reference needs "
                    f"{list(shape)}; use the reference that the run was started with."
                )
        tensors = {n: values[n].to(reference.mean_F.device, torch.float64) for n in shapes}
        return cls(
            **tensors,
            sum_sq_weights=float(values["sum_sq_weights"]),
            num_updates=int(values["num_updates"]),
        )

    @classmethod
    def empty(cls, reference: ReferenceCoordinates) -> EmaState:
        """Start without history; use decay rho_eff(rho, step), which ignores this state first."""
        width, rank = reference.components_FR.shape
        new_zeros = reference.mean_F.new_zeros
        return cls(reference.mean_F, new_zeros(width), new_zeros(rank, rank), 0.0, 0)

    @classmethod
    def bootstrap(cls, features_BF: Tensor, reference: ReferenceCoordinates) -> EmaState:
        """Start from samples of the base policy.

        Args:
            features_BF: [B, F] of any float type; rows that are not finite are left out.
            reference: the reference of the run.
        Returns:
            The state with sum of squared weights 1 / (number of finite rows).
        Raises:
            ConfigError: F is not the reference's width, or no row is finite.
        """
        features_NF = features_BF[check_features(features_BF, reference)]
        if features_NF.shape[0] == 0:
            raise ConfigError("an EMA bootstrap needs at least one finite feature vector, got 0.")
        step = ema_step(cls.empty(reference), features_NF, reference, decay=0.0)
        new = step.state
        return cls(new.mean_F, new.var_F, new.cov_RR, 1.0 / features_NF.shape[0], 0)

    @classmethod
    def from_raw_moments(
        cls, m1_F: Tensor, m2_FF: Tensor, sum_sq_weights: float, reference: ReferenceCoordinates
    ) -> EmaState:
        """Start from raw moments.

        Args:
            m1_F: [F] E[f], debiased.
            m2_FF: [F, F] E[f f^T], debiased.
            sum_sq_weights: sum of the squared sample weights.
            reference: the reference of the run.
        Returns:
            The state.
        """
        mean_F = m1_F.to(reference.mean_F)
        cov_FF = m2_FF.to(reference.mean_F) - torch.outer(mean_F, mean_F)
        cov_RR = reference.map(reference.map(cov_FF).T)
        var_F = cov_FF.diagonal().clamp(min=0)
        return cls(mean_F, var_F, (cov_RR + cov_RR.T) / 2, float(sum_sq_weights), 0)

    @classmethod
    def from_reference(cls, reference: ReferenceCoordinates) -> EmaState:
        """Start at the reference itself, weights 1 / its count (distance 0: no early signal)."""
        cov_RR = torch.diag(reference.eigenvalues_R**2)
        return cls(reference.mean_F, reference.std_F**2, cov_RR, 1.0 / reference.count, 0)


def rho_eff(rho: float, step: int) -> float:
    """Give the decay of a debiased state that equals zero-init EMA with bias correction.

    m_t / (1 - rho^t) obeys the plain recursion with rho (1 - rho^(t-1)) / (1 - rho^t).

    Args:
        rho: decay of the zero-initialised moving average, in [0, 1).
        step: 1 for the first update.
    Returns:
        The decay of this step: 0 at step 1, towards rho later.
    Raises:
        ConfigError: rho or step is out of range.
    """
    if not 0 <= rho < 1 or step < 1:
        raise ConfigError(f"rho = {rho}, step = {step}; use 0 <= rho < 1 and step >= 1.")
    return rho * (1 - rho ** (step - 1)) / (1 - rho**step)


def check_features(features_BF: Tensor, reference: ReferenceCoordinates) -> Tensor:
    """Find the samples that may enter the moments.

    Args:
        features_BF: [B, F] of any float type and scale.
        reference: the reference they will be compared with.
    Returns:
        [B] bool; False where any feature is not finite.
    Raises:
        ConfigError: the shape is not [B, F] of the reference.
    """
    width = reference.mean_F.numel()
    if features_BF.ndim != 2 or features_BF.shape[1] != width:
        raise ConfigError(
            f"features have shape {list(features_BF.shape)}, the reference has {width} dimensions; "
            "use the feature space of the reference."
        )
    return torch.isfinite(features_BF).all(dim=1)


@dataclass(frozen=True, eq=False)
class EmaStep:
    """An EMA step with the parts that leave-one-out formulas need; all float64."""

    state: EmaState
    """The state after the step."""
    deviations_NF: Tensor
    """[N, F] features less their batch mean; exact zeros for equal samples."""
    deviations_NR: Tensor
    """[N, R] the same in reference coordinates."""
    gap_F: Tensor
    """[F] batch mean less the old EMA mean."""
    gap_R: Tensor
    """[R] the same in reference coordinates."""
    batch_var_F: Tensor
    """[F] biased variance of the batch."""
    batch_cov_RR: Tensor
    """[R, R] biased covariance of the batch in reference coordinates."""


def ema_step(
    state: EmaState, features_NF: Tensor, reference: ReferenceCoordinates, *, decay: float
) -> EmaStep:
    """Take one EMA step over a whole batch.

    Args:
        state: moments before the step.
        features_NF: [N, F] of any float type, finite, N >= 1.
        reference: the reference of the run.
        decay: rho in [0, 1): weight of the old state.
    Returns:
        EmaStep on the device of the reference.
    Raises:
        NumericsError: features so large that the new moments overflow.
    """
    num = features_NF.shape[0]
    centred_NF = features_NF.to(reference.mean_F) - reference.mean_F
    # Relative to the first sample: equal samples then deviate by exactly 0.
    relative_NF = centred_NF - centred_NF[0]
    relative_mean_F = relative_NF.mean(dim=0)
    deviations_NF = relative_NF - relative_mean_F
    batch_mean_F = centred_NF[0] + relative_mean_F
    gap_F = batch_mean_F - (state.mean_F - reference.mean_F)
    mapped_MR = reference.map(torch.cat([deviations_NF, gap_F[None]]))
    deviations_NR, gap_R = mapped_MR[:num], mapped_MR[num]
    batch_var_F = deviations_NF.square().mean(dim=0)
    batch_cov_RR = (deviations_NR.T @ deviations_NR).div_(num)
    new, cross = 1.0 - decay, decay * (1.0 - decay)
    cov_RR = (decay * state.cov_RR).add_(batch_cov_RR, alpha=new)
    cov_RR.addr_(gap_R, gap_R, alpha=cross)
    var_F = decay * state.var_F + new * batch_var_F + cross * gap_F.square()
    if not (torch.isfinite(var_F.sum()) and torch.isfinite(cov_RR.diagonal().sum())):
        raise NumericsError(
            f"EMA moments overflow: the largest feature is {float(features_NF.abs().max()):.3g}; "
            "check the feature network and its input range."
        )
    after = EmaState(
        mean_F=torch.lerp(state.mean_F, batch_mean_F + reference.mean_F, new),
        var_F=var_F,
        cov_RR=cov_RR,
        sum_sq_weights=decay**2 * state.sum_sq_weights + new**2 / num,
        num_updates=state.num_updates + 1,
    )
    return EmaStep(after, deviations_NF, deviations_NR, gap_F, gap_R, batch_var_F, batch_cov_RR)
