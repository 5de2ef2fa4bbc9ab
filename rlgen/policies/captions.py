"""Encoded captions: the conditions of a text-conditional policy, and how it takes them in.

Owns their file and the module that embeds them. The text encoder is not rlgen's: features of
flan-t5-xl, or of whatever the policy was trained with, are made once and stored.

Shapes: N captions, T text tokens, W feature width, B images, S condition slots, D policy width.
"""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.weights import read_header, read_tensors, tensors_to_bytes
from rlgen.storage import without_credentials, write_bytes

PROMPTS_KEY = "rlgen.prompts"


@dataclass(frozen=True)
class Captions:
    """Texts with the features that an encoder gave them."""

    prompts: tuple[str, ...]
    """N texts."""
    features_NTW: Tensor
    """Floating point; padded on the right, as encoders do."""
    num_valid_N: Tensor
    """int64: tokens of each caption that are no padding."""


def save_captions(location: str, captions: Captions) -> None:
    """Write captions to a path or fsspec URL, as safetensors.

    Raises:
        StorageError: it can't be written.
    """
    tensors = {"features": captions.features_NTW, "num_valid": captions.num_valid_N}
    metadata = {PROMPTS_KEY: json.dumps(captions.prompts)}
    write_bytes(location, tensors_to_bytes(tensors, metadata))


def load_captions(location: str) -> Captions:
    """Read what `save_captions` wrote.

    Raises:
        CheckpointError: missing, damaged, or no captions; says what is wrong and the way out.
    """
    metadata = read_header(location).get("__metadata__") or {}
    tensors = read_tensors(location)
    try:
        prompts = json.loads(metadata.get(PROMPTS_KEY, "null"))
    except json.JSONDecodeError:
        prompts = None
    problem = _problem(prompts, tensors)
    if problem:
        raise CheckpointError(
            f"{without_credentials(location)} holds no encoded captions: {problem}; write it with "
            "rlgen.policies.captions.save_captions."
        )
    return Captions(tuple(prompts), tensors["features"], tensors["num_valid"].long())


def _problem(prompts: object, tensors: dict[str, Tensor]) -> str:
    """What keeps these from being captions; empty if nothing does."""
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        return f"its metadata {PROMPTS_KEY!r} is no list of texts"
    if not prompts:
        return "it has no prompts"
    if tensors.keys() != {"features", "num_valid"}:
        return f"its tensors are {sorted(tensors)} instead of ['features', 'num_valid']"
    features, num_valid = tensors["features"], tensors["num_valid"]
    if features.ndim != 3 or len(features) != len(prompts) or not features.is_floating_point():
        return (
            f"features are {list(features.shape)} {features.dtype} for {len(prompts)} prompts, and "
            "must be floating point [prompts, tokens, width]"
        )
    if list(num_valid.shape) != [len(prompts)] or num_valid.is_floating_point():
        return f"num_valid is {list(num_valid.shape)} {num_valid.dtype} for {len(prompts)} prompts"
    length = features.shape[1]
    wrong = ((num_valid < 1) | (num_valid > length)).nonzero().flatten().tolist()
    if wrong:
        return f"num_valid[{wrong[0]}] = {int(num_valid[wrong[0]])} is not within 1 and {length}"
    if not features.isfinite().all():
        return "some features are not finite"
    return ""


class CaptionProjection(nn.Module):
    """Two linear layers with a GELU, in its tanh form, between; no biases."""

    def __init__(self, feature_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Any leading shape."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Condition slots from a table of captions; ids from N on mean "without caption id - N".

    The slots are filled from the last one backwards. Without its caption an image has the learned
    features in its slots, as many as the caption has tokens. Slots that no caption of the table
    reaches are seen by none, so they are left out.
    """

    features_NTW: Tensor
    num_valid_N: Tensor
    uncond_embedding: Tensor

    def __init__(self, feature_width: int, width: int, *, num_slots: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(feature_width, width)
        # A buffer, as published: no gradient ever reaches it.
        learned = torch.randn(num_slots, feature_width) / feature_width**0.5
        self.register_buffer("uncond_embedding", learned)
        self.register_buffer("features_NTW", torch.empty(0, 1, feature_width), persistent=False)
        self.register_buffer("num_valid_N", torch.empty(0, dtype=torch.int64), persistent=False)

    def set_captions(self, captions: Captions) -> None:
        """Replace the table.

        Raises:
            ConfigError: captions of another encoder, or longer than the slots.
        """
        num_slots, feature_width = self.uncond_embedding.shape
        width = captions.features_NTW.shape[2]
        length = max(int(captions.num_valid_N.max()), 1)  # what pads all captions is cut
        if width != feature_width or length > num_slots:
            raise ConfigError(
                f"captions have {length} tokens of {width} features, and the policy takes at most "
                f"{num_slots} of {feature_width}; encode them with the policy's own text encoder, "
                f"cut to {num_slots} tokens."
            )
        device = self.uncond_embedding.device
        self.features_NTW = captions.features_NTW[:, :length].to(device)
        self.num_valid_N = captions.num_valid_N.to(device)

    def forward(self, class_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, S, D] float32 of these captions, and which of them are valid, [B, S] bool.

        Raises:
            ConfigError: there are no captions.
        """
        num_captions, num_slots, _ = self.features_NTW.shape
        if num_captions == 0:
            raise ConfigError(
                "a text-conditional policy has no conditions before set_captions; set "
                "policy.captions to a file of encoded captions."
            )
        rows_B = class_ids_B % num_captions
        is_null_B11 = (class_ids_B >= num_captions)[:, None, None]
        # Slot s has token s - (S - valid): negative in the padding on the left.
        padding_B1 = num_slots - self.num_valid_N[rows_B][:, None]
        places_BS = torch.arange(num_slots, device=class_ids_B.device) - padding_B1
        valid_BS = places_BS >= 0
        features_BTW = self.features_NTW[rows_B]
        index_BSW = places_BS.clamp_min(0)[..., None].expand_as(features_BTW)
        features_BSW = features_BTW.gather(1, index_BSW) * valid_BS[..., None]
        learned_SW = self.uncond_embedding[-num_slots:].to(features_BSW.dtype)
        features_BSW = torch.where(is_null_B11, learned_SW, features_BSW)
        slots_BSD = self.cap_proj(features_BSW.to(self.cap_proj.fc1.weight.dtype))
        return slots_BSD.float(), valid_BS
