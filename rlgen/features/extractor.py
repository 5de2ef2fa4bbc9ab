"""What a feature space is to the rest of rlgen, and how one is told from its file.

Owns the protocol and the identity of a feature space: moments from two spaces never mix.
Must not know what the features are used for. Shapes: B images, F features.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlgen.errors import CheckpointError, StorageError
from rlgen.features import dinov2, inception
from rlgen.features.clip_tower import load_clip_tower
from rlgen.features.convnet import ConvNet, ConvNetConfig
from rlgen.features.open_clip_files import is_weight_file
from rlgen.features.open_clip_published import read_published
from rlgen.features.outputs import ExtractorOutputs
from rlgen.nn.weights import (
    KIND_KEY,
    load_state,
    make_config,
    read_header,
    read_weights,
    save_weights,
    state_sha256,
)
from rlgen.storage import is_url, open_binary, without_credentials

KIND = "convnet"
_ACCEPTED = (
    "a net that rlgen wrote, FID's Inception (pt_inception-2015-12-05-6726825d.pth), a DINOv2 "
    "(dinov2_vitl14_pretrain.pth), or a folder with an open_clip model"
)
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

    def outputs(self, images_01: Tensor) -> ExtractorOutputs:
        """The same features, and whatever else the same pass gives."""


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
    def outputs(self, images_01: Tensor) -> ExtractorOutputs:
        """Features and class logits."""
        features_BF = self(images_01)
        return ExtractorOutputs(features_BF, self.net.head(features_BF))


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
    """Read a feature extractor; what it is follows from the content of the file or folder.

    Args:
        location: by path or fsspec URL, one of: a net that rlgen wrote (safetensors); FID's
            Inception (pt_inception-2015-12-05-6726825d.pth); a DINOv2 without registers
            (dinov2_vitl14_pretrain.pth); a folder in open_clip's `local-dir:` format, of which
            the image tower is taken.
    Raises:
        CheckpointError: missing, damaged, or none of these.
    """
    if not is_weight_file(location) and _has_open_clip_config(location):
        return load_clip_tower(location, device)
    if _is_rlgen_file(location):
        return ConvNetExtractor(load_convnet(location, device))
    state, _ = read_published(location)
    shown = without_credentials(location)
    if inception.FIRST_KEY in state:
        return inception.inception_from_state(state, shown, device)
    if all(key in state for key in dinov2.KEYS):
        return dinov2.dinov2_from_state(state, shown, device)
    if "visual.conv1.weight" in state or "visual.proj" in state:
        hint = "It is a CLIP: put it into a folder with open_clip_config.json, in open_clip's "
        hint += "local-dir format, which says its architecture."
    else:
        hint = f"Its tensors begin with {', '.join(list(state)[:3])}."
    raise CheckpointError(f"{shown} is no feature extractor that rlgen knows: {_ACCEPTED}. {hint}")


def _has_open_clip_config(location: str) -> bool:
    """Whether there is a folder with open_clip's configuration."""
    if is_url(location):
        return True  # a URL without a file's ending; what is missing there is then told
    return Path(location.removeprefix("file://")).is_dir()


def _is_rlgen_file(location: str) -> bool:
    """Whether it is a safetensors file with rlgen's metadata, from its first bytes."""
    try:
        with open_binary(location) as stream:
            head = stream.read(9)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    if head[8:] != b"{":
        return False
    return KIND_KEY in (read_header(location).get("__metadata__") or {})
