"""A tiny multi-scale tokenizer for small gray images: ConvVQ's nets around VAR's quantizer.

Owns the training loss over the scales; must not know the data nor the optimiser.
Shapes: B images, S image side, L tokens of all scales, V codes, C code dimensions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import ConfigError
from rlgen.tokenizers.conv_vq import (
    STRIDE,
    ConvVQOutput,
    conv_decoder,
    conv_encoder,
    gray_to_rgb_01,
    rgb_01_to_gray,
)
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer


@dataclass(frozen=True)
class MultiScaleConvVQConfig:
    """Sizes of a `MultiScaleConvVQ`."""

    image_size: int = 16
    """Side of the image in pixels, 4 times the last of patch_nums."""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4)
    """Tokens along a side, per scale."""
    codebook_size: int = 64
    code_dim: int = 8
    outer_width: int = 32
    """Encoder channels at half resolution."""
    inner_width: int = 48
    """Encoder channels at the resolution of the last scale."""
    decoder_width: int = 64
    num_phi: int = 4
    """Convolutions that smooth the enlarged scales, shared among them."""
    quant_resi: float = 0.5
    commitment_coef: float = 0.25

    def __post_init__(self) -> None:
        """Refuse scales that do not end at the nets' grid."""
        if self.image_size != STRIDE * self.patch_nums[-1]:
            raise ConfigError(
                f"image_size = {self.image_size} is not {STRIDE} times the last of patch_nums = "
                f"{list(self.patch_nums)}; change one of them."
            )


class MultiScaleConvVQ(nn.Module):
    """Images to codes of growing maps and back."""

    def __init__(self, config: MultiScaleConvVQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.codebook_size = config.codebook_size
        self.encoder = conv_encoder(config.outer_width, config.inner_width, config.code_dim)
        self.quantize = MultiScaleQuantizer(
            MultiScaleConfig(
                codebook_size=config.codebook_size,
                code_dim=config.code_dim,
                patch_nums=config.patch_nums,
                num_phi=config.num_phi,
                quant_resi=config.quant_resi,
            )
        )
        self.decoder = conv_decoder(config.code_dim, config.decoder_width)
        self.num_tokens = self.quantize.num_tokens
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images_01: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to codes of all scales, coarse to fine: int64 [B, L]."""
        return self.quantize.encode(self.encoder(rgb_01_to_gray(images_01)))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Codes [B, L] to images [B, 3, S, S] in [0, 1], gray repeated (one memory)."""
        return gray_to_rgb_01(self.decoder(self.quantize.f_hat(tokens_BL)))

    def forward(self, images_01: Tensor) -> ConvVQOutput:
        """Encode, quantise straight-through and decode, with losses.

        The codebook and commitment losses are means over the scales, each between the latents and
        the sum up to that scale. The latents in the output are the residuals at which codes were
        searched, [B*L, C].

        Args:
            images_01: [B, 3, S, S] in [0, 1].
        Source: VAR, arXiv:2404.02905, section 3.2.
        """
        gray = rgb_01_to_gray(images_01)
        latents = self.encoder(gray)
        tokens_BL, residuals_BLC = self.quantize.quantize(latents)
        # (S, B, C, P, P)
        sums = torch.stack(self.quantize.partial_sums(tokens_BL))
        straight_through = latents + (sums[-1] - latents).detach()
        mse = F.mse_loss(self.decoder(straight_through), gray)
        targets = latents.expand_as(sums)
        codebook_loss = F.mse_loss(sums, targets.detach())
        commitment_loss = F.mse_loss(targets, sums.detach())
        return ConvVQOutput(
            loss=mse + codebook_loss + self.config.commitment_coef * commitment_loss,
            reconstruction_mse=mse.detach(),
            latents=residuals_BLC.flatten(0, 1),
            tokens_BL=tokens_BL,
        )
