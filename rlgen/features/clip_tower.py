"""The image tower of any open_clip model as a feature space.

Owns the choice of the layer: the projected embedding before it is normalised, as distances
between distributions of CLIP features are published. Shapes: B images, F features.
"""

import hashlib
import json
from typing import Any

import open_clip
import torch
from torch import Tensor

from rlgen.features.open_clip_files import load_vision, open_clip_config
from rlgen.features.outputs import ExtractorOutputs
from rlgen.features.preprocess import Preprocess
from rlgen.nn.weights import state_sha256

_BATCH_SIZE = 256


class ClipTowerExtractor:
    """An open_clip image tower with its own preprocessing."""

    def __init__(
        self, model: open_clip.CLIP, preprocess: Preprocess, model_config: dict[str, Any]
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.num_features = int(model_config["embed_dim"])
        # The function follows from more than the weights: the activation, pooling, resize, mean.
        tower = {
            name: value
            for name, value in sorted(model_config.items())
            if name not in ("text_cfg", "multimodal_cfg", "custom_text")
        }
        told = json.dumps([tower, repr(preprocess)], sort_keys=True)
        weights = state_sha256(model.visual.state_dict())
        digest = hashlib.sha256(f"{told}{weights}".encode()).hexdigest()
        size, mode = preprocess.image_size[0], preprocess.resize_mode
        self.feature_space = f"open_clip-tower-{self.num_features}:{mode}-{size}:{digest[:16]}"

    @torch.inference_mode()
    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to float32 [B, F], not normalised."""
        return torch.cat(
            [
                self.model.encode_image(self.preprocess(part)).float()
                for part in images_01.split(_BATCH_SIZE)
            ]
        )

    def outputs(self, images_01: Tensor) -> ExtractorOutputs:
        """Features alone."""
        return ExtractorOutputs(self(images_01))


def load_clip_tower(
    location: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> ClipTowerExtractor:
    """Read the image tower of a folder, or of a single file whose architecture `model` names.

    Raises:
        CheckpointError: as for `load_open_clip`.
        ConfigError: open_clip has no such model.
    """
    config = open_clip_config(location, model)
    net, preprocess = load_vision(location, device, model=model)
    return ClipTowerExtractor(net, preprocess, config["model_cfg"])
