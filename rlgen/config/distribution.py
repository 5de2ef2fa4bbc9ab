"""The configuration of the distribution reward. Must not import torch."""

from typing import Annotated, Literal

from pydantic import Field

from rlgen.config.base import EMBEDDED, NonNegative, PositiveInt, Section


class LooFidConfig(Section):
    """The distribution reward: leave-one-out FID over EMA feature moments."""

    weight: NonNegative = 1.0
    """Weight of its advantages; 0 still tracks the EMA's FID but rewards nothing."""
    extractor: str = EMBEDDED
    """Path or URL of the feature extractor's weights."""
    reference: str = EMBEDDED
    """Path or URL of the reference moments, taken in the extractor's feature space."""
    covariance: Literal["full", "diagonal"] = "full"
    """Exact full covariance, or the diagonal form of the published method."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """EMA decay of the feature moments per step."""
    bootstrap_images: PositiveInt = 2000
    """Images of the base policy that the EMA starts from."""
