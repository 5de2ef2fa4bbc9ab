"""Training of the digits' VQ tokenizers, of one scale and of several.

Owns their recipe: scales, batch, rate and the reset of unused codes.
"""

import torch
from torch import Tensor, nn

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, minimize, seeded_init
from rlgen.tokenizers.conv_vq import STRIDE, ConvVQ, ConvVQConfig
from rlgen.tokenizers.multiscale_conv_vq import MultiScaleConvVQ, MultiScaleConvVQConfig

BATCH_SIZE = 128
MAX_LR = 1e-2
RESET_EVERY_STEPS = 50
RESET_UNTIL_FRACTION = 0.7
"""Late resets would leave codes that the decoder has had no time to learn."""


def train_tokenizer(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> ConvVQ:
    """Train the tokenizer on the training digits; the same for the same config on the CPU."""
    with seeded_init(config.seed):
        tokenizer = ConvVQ(
            ConvVQConfig(image_size=config.image_size, codebook_size=config.codebook_size)
        )
    _fit(tokenizer, tokenizer.codebook, data, config, on_step)
    return tokenizer


def train_multiscale_tokenizer(
    data: DigitsData, config: DigitsConfig, *, on_step: OnStep | None = None
) -> MultiScaleConvVQ:
    """Train the tokenizer of a tiny VAR in the same way."""
    with seeded_init(config.seed):
        tokenizer = MultiScaleConvVQ(
            MultiScaleConvVQConfig(
                image_size=config.image_size,
                patch_nums=growing_sides(config.image_size // STRIDE),
                codebook_size=config.codebook_size,
            )
        )
    _fit(tokenizer, tokenizer.quantize.embedding, data, config, on_step)
    return tokenizer


def growing_sides(grid_size: int) -> tuple[int, ...]:
    """Tokens along a side per scale: each about a third more than the last, up to the grid."""
    sides = [1]
    while sides[-1] < grid_size:
        sides.append(min(grid_size, sides[-1] + max(1, round(sides[-1] / 3))))
    return tuple(sides)


def _fit(
    tokenizer: ConvVQ | MultiScaleConvVQ,
    codebook: nn.Embedding,
    data: DigitsData,
    config: DigitsConfig,
    on_step: OnStep | None,
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    uses_V = torch.zeros(config.codebook_size, dtype=torch.int64)
    last_reset_step = int(config.tokenizer_steps * RESET_UNTIL_FRACTION)

    def loss_at(step: int) -> Tensor:
        rows = draw_rows(len(data.train.labels_N), BATCH_SIZE, generator)
        output = tokenizer(data.train.images_01[rows])
        uses_V.add_(torch.bincount(output.tokens_BL.flatten(), minlength=len(uses_V)))
        if (step + 1) % RESET_EVERY_STEPS == 0:
            if step < last_reset_step:
                _reset_dead_codes(codebook, uses_V, output.latents, generator)
            uses_V.zero_()
        return output.loss

    minimize(tokenizer, loss_at, num_steps=config.tokenizer_steps, max_lr=MAX_LR, on_step=on_step)


@torch.no_grad()
def _reset_dead_codes(
    codebook: nn.Embedding, uses_V: Tensor, latents: Tensor, generator: torch.Generator
) -> None:
    """Move the codes that no latent chose onto latents of the current batch."""
    dead = (uses_V == 0).nonzero().flatten()
    rows = torch.randint(len(latents), (len(dead),), generator=generator)
    # Through .data, because the codebook is part of the graph of this step's loss.
    codebook.weight.data[dead] = latents[rows]
