"""The cosine between an image and its prompt in an open_clip model.

Owns what CLIP and HPSv2 scoring share; `features` reads the models. Shapes: B images, P prompts,
D embedding width.
"""

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.features.open_clip_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Tokenizer,
    build_open_clip,
    load_open_clip,
    read_open_clip_config,
    save_open_clip,
)
from rlgen.features.preprocess import Preprocess, default_preprocess

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "CosineScorer",
    "Preprocess",
    "Tokenizer",
    "build_open_clip",
    "default_preprocess",
    "load_open_clip",
    "read_open_clip_config",
    "save_open_clip",
]

BATCH_SIZE = 256
"""Images at once; the activations of a ViT-H are then some 5 GB."""


class CosineScorer:
    """Cosine between an image and its prompt, with text features computed once per prompt."""

    def __init__(self, model: open_clip.CLIP, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self._text_cache: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, images_01: Tensor, prompts: Sequence[str], class_ids_B: Tensor) -> Tensor:
        """Return the cosines, float32 [B]; classes play no part."""
        if len(prompts) != len(images_01):
            raise ValueError(f"{len(prompts)} prompts for {len(images_01)} images; give one each.")
        image_features = self.image_features(images_01)
        return (image_features * self.text_features(prompts)).sum(-1)

    @torch.inference_mode()
    def image_features(self, images_01: Tensor) -> Tensor:
        """Return unit vectors, float32 [B, D]."""
        # The dot product is taken in float32: in half precision scores move in steps of 2e-4.
        return torch.cat(
            [
                F.normalize(self.model.encode_image(self.preprocess(part)).float(), dim=-1)
                for part in images_01.split(BATCH_SIZE)
            ]
        )

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors, float32 [P, D]; only prompts not seen before are computed."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        new = [prompt for prompt in rows if prompt not in self._text_cache]
        if new:
            device = next(self.model.parameters()).device
            tokens_PT = self.tokenizer(new).to(device)
            # One by one: a batch would round differently with each set of prompts, and scores
            # must not depend on which unit a worker happened to see first.
            for prompt, tokens_T in zip(new, tokens_PT, strict=True):
                features = self.model.encode_text(tokens_T[None]).float()
                self._text_cache[prompt] = F.normalize(features, dim=-1)[0]
        distinct = torch.stack([self._text_cache[prompt] for prompt in rows])
        return distinct[[rows[prompt] for prompt in prompts]]
