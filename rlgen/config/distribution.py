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
    class_conditional: bool = False
    """Compare each image with its class: the reference's mean of the class is taken from its
    features, and the reference is the covariance within classes. Needs a reference with class
    means, whose classes are called like class_names or are as many in the order of the ids."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """EMA decay of the feature moments per step."""
    start: Literal["policy", "reference"] = "policy"
    """What the EMA starts from: images of the base policy, or the reference itself. The latter
    costs no images, but begins at distance 0: there is little signal until the window has passed,
    and the history hides what the policy does."""
    bootstrap_images: PositiveInt = 2000
    """Images of the base policy that the EMA starts from if start is policy."""

    def effective_samples(self, images_per_step: int) -> float:
        """Samples that the EMA is worth once it has forgotten its start."""
        return images_per_step * (1 + self.decay) / (1 - self.decay)
