"""What one pass of a feature network gives beside the features.

Shapes: B images, F features, C classes, S spatial features.
"""

from typing import NamedTuple

from torch import Tensor


class ExtractorOutputs(NamedTuple):
    """Everything that metrics need of some images; float32."""

    features_BF: Tensor
    logits_BC: Tensor | None = None
    """Of the classes that the network was trained on, as the Inception score takes them; None if
    it has none."""
    spatial_BS: Tensor | None = None
    """Features that keep their place in the image, as sFID takes them; None if there are none."""
