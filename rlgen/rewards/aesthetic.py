"""LAION's aesthetic predictors as rewards: a head on CLIP's image features.

Owns the two published heads. v1 is one linear layer; v2 five of them with nothing in between in
use (dropout trains only, and there is no activation), so that both are one affine map of the unit
features. Shapes: B images, D embedding width.
"""

import re
from collections.abc import Mapping, Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.errors import CheckpointError
from rlgen.features.open_clip_files import load_vision
from rlgen.features.preprocess import Preprocess
from rlgen.nn.public_files import read_public_state
from rlgen.storage import without_credentials

BATCH_SIZE = 256
_V2_LAYERS = (0, 2, 4, 6, 7)
"""Places of v2's linear layers; the gaps are its dropouts. A head with activations has others."""


class AestheticHead:
    """score = features . weight + bias, on unit features."""

    def __init__(self, weight_D: Tensor, bias: Tensor) -> None:
        # In float64, as the layers were multiplied: the cost is nothing beside the tower.
        self.weight_D = weight_D.double()
        self.bias = bias.double()

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.weight_D)

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Map image features, of any length, to float32 [B]; about 1 to 10."""
        unit_BD = F.normalize(features_BD.float(), dim=-1)
        scores_B = unit_BD.double() @ self.weight_D.to(unit_BD.device)
        return (scores_B + self.bias.to(unit_BD.device)).float()


class AestheticScorer:
    """Predicted rating of an image; prompts and classes play no part."""

    def __init__(self, model: open_clip.CLIP, preprocess: Preprocess, head: AestheticHead) -> None:
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.head = head

    @torch.inference_mode()
    def __call__(self, images_01: Tensor, prompts: Sequence[str], class_ids_B: Tensor) -> Tensor:
        """Return the ratings, float32 [B]."""
        return torch.cat(
            [
                self.head(self.model.encode_image(self.preprocess(part)))
                for part in images_01.split(BATCH_SIZE)
            ]
        )


def load_aesthetic_scorer(
    location: str, head: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> AestheticScorer:
    """Read a scorer.

    Args:
        location: the CLIP that the head was trained on, as for `load_clip_scorer`; for the
            published ViT-L/14 heads OpenAI's.
        head: the head's file, such as sa_0_4_vit_l_14_linear.pth (v1) or
            sac+logos+ava1-l14-linearMSE.pth (v2); a path or fsspec URL.
        model: for a single file, open_clip's name of its architecture: ViT-L-14-quickgelu.
    Raises:
        CheckpointError: a file is missing or damaged, or the head is for other features.
        ConfigError: open_clip has no such model.
    """
    made = load_head(head)
    net, preprocess = load_vision(location, device, model=model)
    width = _embedding_width(net)
    if width != made.num_features:
        raise CheckpointError(
            f"{without_credentials(head)} scores features of width {made.num_features} and "
            f"{without_credentials(location)} gives {width}; use the head of this CLIP, or the "
            "CLIP of this head (768: ViT-L/14, 512: ViT-B/32)."
        )
    return AestheticScorer(net, preprocess, made)


@torch.inference_mode()
def _embedding_width(net: open_clip.CLIP) -> int:
    height, width = net.visual.image_size
    parameter = next(net.parameters())
    pixels = torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
    return int(net.encode_image(pixels).shape[-1])


def load_head(location: str) -> AestheticHead:
    """Read a head of either version, told by its tensors.

    Raises:
        CheckpointError: missing, damaged, or another network.
    """
    return head_from_state(read_public_state(location), without_credentials(location))


def head_from_state(state: Mapping[str, Tensor], shown: str) -> AestheticHead:
    """Multiply a head's layers into one affine map.

    Raises:
        CheckpointError: the tensors are not those of a published head.
    """
    names = {"weight", "bias"}
    for_v2 = {f"layers.{place}.{name}" for place in _V2_LAYERS for name in names}
    if set(state) not in (names, for_v2):
        places = sorted({int(p) for p in re.findall(r"layers\.(\d+)\.", " ".join(state))})
        found = f"layers {places}" if places else f"tensors {', '.join(sorted(state)[:4])}"
        raise CheckpointError(
            f"{shown} is no published aesthetic head: it has {found}, where v1 has one weight and "
            f"bias and v2 layers {list(_V2_LAYERS)}. A head with activations (reluMSE) or of "
            "another shape is not supported."
        )
    prefixes = [""] if set(state) == names else [f"layers.{place}." for place in _V2_LAYERS]
    weight, bias = state[f"{prefixes[0]}weight"].double(), state[f"{prefixes[0]}bias"].double()
    try:
        for prefix in prefixes[1:]:
            layer = state[f"{prefix}weight"].double()
            weight, bias = layer @ weight, layer @ bias + state[f"{prefix}bias"].double()
    except RuntimeError as error:
        raise CheckpointError(f"{shown} has layers that do not fit together ({error}).") from None
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise CheckpointError(
            f"{shown} gives {tuple(bias.shape)} numbers an image; an aesthetic head gives one."
        )
    return AestheticHead(weight[0], bias[0])
