"""What a feature space is to the rest of rlgen, and how one is read from a weight file.

Owns the protocol and the identity of a feature space: moments from two spaces never mix.
Must not know what the features are used for. Shapes: B images, F features.
"""

from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor

from rlgen.features.convnet import ConvNet, ConvNetConfig
from rlgen.nn.weights import (
    load_state,
    make_config,
    read_weights,
    save_weights,
    state_sha256,
)

KIND = "convnet"
BATCH_SIZE = 128


class FeatureExtractor(Protocol):
    """Images to feature vectors."""

    @property
    def feature_space(self) -> str:
        """Identifier of architecture and weights; equal only for the same function."""

    @property
    def num_features(self) -> int:
        """F."""

    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to float32 [B, F]."""


class ConvNetExtractor:
    """The feature layer of a `ConvNet`."""

    def __init__(self, net: ConvNet) -> None:
        self.net = net.requires_grad_(False).eval()
        digest = state_sha256(net.state_dict())
        self.feature_space = f"convnet-{net.config.architecture}:{digest[:16]}"
        self.num_features = net.config.num_features

    @torch.inference_mode()
    def __call__(self, images_01: Tensor) -> Tensor:
        # Small batches stay in the CPU's cache: half the time for 480 images.
        return torch.cat([self.net.features(part) for part in images_01.split(BATCH_SIZE)])

    @torch.inference_mode()
    def classify(self, images_01: Tensor) -> Tensor:
        """Return class logits [B, num_classes]."""
        return self.net.head(self(images_01))


def save_convnet(location: str, net: ConvNet) -> None:
    """Write the net as a self-describing weight file."""
    save_weights(location, net, kind=KIND, config=asdict(net.config))


def load_convnet(location: str, device: torch.device | str = "cpu") -> ConvNet:
    """Read a net for use, with its classifier.

    Raises:
        CheckpointError: the file is missing, damaged, or not a ConvNet.
    """
    fields, state = read_weights(location, kind=KIND)
    net = ConvNet(make_config(ConvNetConfig, fields, location))
    load_state(net, state, location)
    return net.requires_grad_(False).eval().to(device)


def load_extractor(location: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Read a feature extractor from a self-describing weight file.

    Raises:
        CheckpointError: the file is missing, damaged, or not of a known kind.
    """
    return ConvNetExtractor(load_convnet(location, device))
