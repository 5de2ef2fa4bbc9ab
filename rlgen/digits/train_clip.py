"""Training of the tiny open_clip model on captions of digits.

Owns its sizes and its recipe; the model is open_clip's own CLIP class.
"""

from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.digits.captions import make_caption_table
from rlgen.digits.data import DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, minimize, seeded_init
from rlgen.rewards.open_clip_model import Preprocess, build_open_clip, default_preprocess

BATCH_SIZE = 96
MAX_LR = 3e-3
PIXEL_NOISE_STD = 0.05
CONTEXT_LENGTH = 16


def clip_model_config(config: DigitsConfig) -> dict[str, Any]:
    """Return open_clip's model_cfg of the tiny CLIP."""
    return {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.image_size // 4,
            "width": 48,
            "layers": 3,
            "head_width": 24,
            "mlp_ratio": 2.0,
            "pool_type": "avg",
        },
        # The vocabulary is that of CLIP's own tokenizer, so any prompt can be scored.
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }


def digits_preprocess(config: DigitsConfig) -> Preprocess:
    """Return the preprocessing of the tiny CLIP: normalisation alone at the native size."""
    return default_preprocess(config.image_size)


def train_clip(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """Train the CLIP on training digits; the same for the same config on the CPU.

    Contrastive, with every caption that is true of an image as a positive: classes repeat
    within a batch, and "a photo of the digit three" describes a small three as well.

    Returns:
        The model, and the model_cfg that open_clip builds it from.
    """
    model_config = clip_model_config(config)
    with seeded_init(config.seed):
        model = build_open_clip(model_config, "the tiny CLIP")
    # 49,408 rows of which the captions use forty: random rows serve as well as trained ones.
    model.token_embedding.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    preprocess = digits_preprocess(config)
    table = make_caption_table(names_styles=config.style is not None)
    tokens_UT = SimpleTokenizer(context_length=CONTEXT_LENGTH)(list(table.texts))
    truth_NU = table.truth_NU(data.train).float()

    def loss_at(step: int) -> Tensor:
        rows = draw_rows(len(truth_NU), BATCH_SIZE, generator)
        truth_BU = truth_NU[rows]
        chosen = torch.multinomial(truth_BU, 1, generator=generator).unique()
        images_01 = data.train.images_rgb_01[rows]
        noise = torch.randn(images_01[:, :1].shape, generator=generator) * PIXEL_NOISE_STD
        image_features = model.encode_image(preprocess(images_01 + noise), normalize=True)
        text_features = model.encode_text(tokens_UT[chosen], normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        return contrastive_loss(logits, truth_BU[:, chosen])

    minimize(model, loss_at, num_steps=config.clip_steps, max_lr=MAX_LR, on_step=on_step)
    return model, model_config


def contrastive_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Return the mean of the image-to-text and text-to-image cross entropies.

    Args:
        logits: [B, U], images against distinct captions.
        positives: [B, U] of 0 and 1, at least one 1 in each row and column; a row or column
            shares its target equally among its ones.
    Source: CLIP, arXiv:2103.00020, figure 3, with several positives.
    """
    to_text = positives / positives.sum(1, keepdim=True)
    to_image = positives / positives.sum(0, keepdim=True)
    image_loss = -(to_text * logits.log_softmax(1)).sum(1).mean()
    text_loss = -(to_image * logits.log_softmax(0)).sum(0).mean()
    return (image_loss + text_loss) / 2
