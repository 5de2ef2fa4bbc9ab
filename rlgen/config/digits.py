"""Settings of the embedded default: real handwritten digits and the tiny models on them.

Owns what is trained by the `pretrain` job; every field below enters the cache key.
"""

from typing import Annotated, Literal

from pydantic import Field

from rlgen.config.base import PositiveInt, Section


class DigitsConfig(Section):
    """How the embedded default's data and models are made."""

    family: Literal["llamagen", "vqgan", "var"] = "llamagen"
    """Architecture of the tiny policy; `var` gets a multi-scale tokenizer."""
    style: Literal["slanted", "thick", "inverted"] | None = None
    """Style that the references ask for. The tokenizer and all nets then learn plain, slanted,
    thick and inverted digits, and the base policy plain ones alone; null leaves styles out."""
    image_size: Annotated[int, Field(ge=16, multiple_of=16)] = 16
    """Side of an image in pixels; scikit-learn's 8x8 digits are enlarged to it."""
    num_heldout: Annotated[int, Field(ge=100, le=900)] = 297
    """Digits that no training sees; the judge's reference statistics include them."""
    augmentations: PositiveInt = 10
    """Randomly rotated, scaled and shifted copies of each digit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, the tokenizer, the feature net, the CLIP and the preference model."""
    policy_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the base policy's initialisation and of its pretraining order."""
    codebook_size: Annotated[int, Field(ge=8)] = 64
    """Codes of the tokenizer."""
    tokenizer_steps: PositiveInt = 600
    """Optimiser steps of each tokenizer, at batch 128."""
    feature_steps: PositiveInt = 400
    """Optimiser steps of the feature net, and of the judge, at batch 128."""
    clip_steps: PositiveInt = 500
    """Optimiser steps of the tiny open_clip model, at batch 96."""
    preference_steps: PositiveInt = 220
    """Optimiser steps of the preference model, which starts from the CLIP, at 72 pairs."""
    policy_width: Annotated[int, Field(ge=16)] = 64
    """Width of the tiny policy."""
    policy_layers: PositiveInt = 3
    """Transformer blocks of the tiny policy."""
    policy_heads: PositiveInt = 4
    """Attention heads of the tiny policy."""
    policy_steps: PositiveInt = 280
    """Optimiser steps of the base policy, at batch 128: left short of perfect on purpose."""
    class_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.15
    """Share of labels replaced by the null class in pretraining, which makes guidance possible;
    a `vqgan` policy has a null class only if this is above 0."""
