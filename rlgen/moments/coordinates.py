"""Reference coordinates: where the cross term of a Frechet distance needs no products.

Owns the factor Sigma_r = L L^T of a reference and the map y = L^T f. In these coordinates
L^T C L, whose square-root trace a Frechet distance needs, is simply the covariance of y. The
components are ordered by descending eigenvalue: the covariance is then graded, which keeps its
small eigenvalues accurate. Must not know about EMA state.

Shapes: B samples, F feature dimensions, R kept reference components, K measured dimensions
(F, or R where the reference is truncated).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.moments.reference import ReferenceMoments

RELATIVE_CUT = 1e-12
"""Eigenvalues below this share of the largest are the null space of the reference."""


@dataclass(frozen=True, eq=False)
class ReferenceCoordinates:
    """A reference Gaussian with its covariance factored; all tensors float64, one device."""

    count: int
    """Number of reference samples."""
    mean_F: Tensor
    """[F] reference mean."""
    std_F: Tensor
    """[F] reference standard deviation of each dimension, divisor count."""
    components_FR: Tensor
    """[F, R] orthonormal eigenvectors, by descending eigenvalue; R may be 0."""
    eigenvalues_R: Tensor
    """[R] positive, descending."""
    trace: float
    """tr Sigma_r; of the kept components only where truncated."""
    is_truncated: bool
    """Whether the distance is restricted to the kept components."""

    def map(self, offsets_BF: Tensor) -> Tensor:
        """Map differences of feature vectors to reference coordinates.

        Args:
            offsets_BF: [B, F] float64, differences or features less a mean.
        Returns:
            [B, R] L^T offset, in squared feature units.
        """
        return (offsets_BF @ self.components_FR) * self.eigenvalues_R.sqrt()

    def measured(self, offsets_BF: Tensor, coordinates_BR: Tensor) -> Tensor:
        """Give the coordinates in which the mean and trace terms are measured.

        Args:
            offsets_BF: [B, F] differences of feature vectors.
            coordinates_BR: [B, R] the same in reference coordinates.
        Returns:
            [B, K] offsets themselves, or their kept components where truncated.
        """
        return coordinates_BR / self.eigenvalues_R.sqrt() if self.is_truncated else offsets_BF


def to_coordinates(
    reference: ReferenceMoments,
    *,
    max_components: int | None = None,
    device: torch.device | str = "cpu",
) -> ReferenceCoordinates:
    """Factor a reference covariance once, for many steps.

    Args:
        reference: moments over F dimensions.
        max_components: restrict the whole distance to that many leading components, if the
            reference has more; None keeps every dimension in the mean and trace terms.
        device: where the steps run; must support float64.
    Returns:
        ReferenceCoordinates on the device.
    Raises:
        ConfigError: max_components is below 1.
    """
    if max_components is not None and max_components < 1:
        raise ConfigError(f"max_components = {max_components}; use at least 1, or None for all.")
    cov_FF = reference.cov_FF.to(device=device, dtype=torch.float64)
    values_F, vectors_FF = torch.linalg.eigh(cov_FF)
    values_F, vectors_FF = values_F.flip(0), vectors_FF.flip(1)
    rank = int(((values_F > RELATIVE_CUT * values_F[0]) & (values_F > 0)).sum())
    is_truncated = max_components is not None and max_components < rank
    kept = max_components if max_components is not None and is_truncated else rank
    eigenvalues_R = values_F[:kept].contiguous()
    return ReferenceCoordinates(
        count=reference.count,
        mean_F=reference.mean_F.to(device=device, dtype=torch.float64),
        std_F=cov_FF.diagonal().clamp(min=0).sqrt(),
        components_FR=vectors_FF[:, :kept].contiguous(),
        eigenvalues_R=eigenvalues_R,
        trace=float(eigenvalues_R.sum() if is_truncated else cov_FF.trace()),
        is_truncated=is_truncated,
    )
