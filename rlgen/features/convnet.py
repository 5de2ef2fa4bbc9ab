"""Small convolutional classifiers with a named feature layer, in two architectures.

Owns the networks; must not know the data. One makes the reward's feature space and the
other, built differently on purpose, the judge's. Shapes: B images, F features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURE_BIAS = 2.0


@dataclass(frozen=True)
class ConvNetConfig:
    """Sizes of a `ConvNet`."""

    architecture: Literal["plain", "residual"] = "plain"
    """plain: two convolutions with ReLU and max-pool, then one linear layer on the grid.
    residual: strided residual blocks with GELU and group norm, averaged over the grid."""
    image_size: int = 16
    width: int = 32
    num_features: int = 64
    num_classes: int = 10


class ConvNet(nn.Module):
    """Image to features (after a ReLU) to class logits."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = _plain_trunk(config) if config.architecture == "plain" else _residual(config)
        self.head = nn.Linear(config.num_features, config.num_classes)
        # Pooling over the other layout takes five times as long on a CPU.
        self.to(memory_format=torch.channels_last)

    def features(self, images_01: Tensor) -> Tensor:
        """Return the feature layer.

        Args:
            images_01: [B, 3, S, S] in [0, 1]; the channels are averaged.
        Returns:
            float32 [B, F], not negative.
        """
        return F.relu(self.trunk(images_01.mean(1, keepdim=True) * 2 - 1)).float()

    def classify(self, images_01: Tensor) -> Tensor:
        """Return class logits [B, num_classes]."""
        return self.head(self.features(images_01))


def _plain_trunk(config: ConvNetConfig) -> nn.Sequential:
    width, grid = config.width, config.image_size // 4
    return nn.Sequential(
        nn.Conv2d(1, width // 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width // 2, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        _biased(nn.Linear(width * grid * grid, config.num_features)),
    )


def _residual(config: ConvNetConfig) -> nn.Sequential:
    width = config.width
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        _ResidualBlock(width),
        nn.Conv2d(width, config.num_features, 4, stride=2, padding=1),
        _ResidualBlock(config.num_features),
        nn.GELU(),
        _biased(nn.Conv2d(config.num_features, config.num_features, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _biased(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Let the feature layer begin positive.

    With a bias of 0 a sixth of the features never becomes positive for any digit, and the
    covariance of the features is singular.
    """
    assert layer.bias is not None, "a feature layer has a bias"
    nn.init.constant_(layer.bias, FEATURE_BIAS)
    return layer


class _ResidualBlock(nn.Module):
    """x + conv(gelu(norm(x))), pre-activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.gelu(self.norm(x)))
