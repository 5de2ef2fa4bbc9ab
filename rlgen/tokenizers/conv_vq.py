"""A tiny convolutional VQ tokenizer for small gray images.

Owns the network, the nearest-code lookup and the training loss; must not know the data nor
the optimiser. Shapes: B images, L image tokens, V codes, C code dimensions, S image side.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.tokenizers.codebook import nearest_codes

KIND = "conv_vq"
STRIDE = 4
"""Two convolutions of stride 2: a token stands for 4x4 pixels."""


@dataclass(frozen=True)
class ConvVQConfig:
    """Sizes of a `ConvVQ`."""

    image_size: int = 16
    """Side of the image in pixels, a multiple of 4."""
    codebook_size: int = 64
    code_dim: int = 8
    outer_width: int = 32
    """Encoder channels at half resolution."""
    inner_width: int = 48
    """Encoder channels at the resolution of the token grid."""
    decoder_width: int = 64
    commitment_coef: float = 0.25


@dataclass(frozen=True)
class ConvVQOutput:
    """What a training step needs."""

    loss: Tensor
    """Scalar: reconstruction + codebook + commitment_coef * commitment, values in -1..1."""
    reconstruction_mse: Tensor
    """Scalar, values in -1..1 and not clamped."""
    latents: Tensor
    """[B*L, C], detached: what dead codes are reset to."""
    tokens_BL: Tensor


class ConvVQ(nn.Module):
    """Images to a square grid of codes and back."""

    def __init__(self, config: ConvVQConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.code_dim
        self.encoder = conv_encoder(config.outer_width, config.inner_width, dim)
        self.codebook = nn.Embedding(config.codebook_size, dim)
        self.decoder = conv_decoder(dim, config.decoder_width)
        self.to(memory_format=torch.channels_last)

    @property
    def image_size(self) -> int:
        """S."""
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.config.image_size // STRIDE

    @property
    def num_tokens(self) -> int:
        """L: tokens of one image, in raster order."""
        return self.grid_size**2

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.config.codebook_size

    @torch.no_grad()
    def encode(self, images_01: Tensor) -> Tensor:
        """Return the nearest codes.

        Args:
            images_01: [B, 3, S, S] in [0, 1]; the channels are averaged.
        Returns:
            int64 [B, L].
        """
        return self._nearest(self._latents(images_01)).view(len(images_01), -1)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return images of codes: [B, 3, S, S] in [0, 1], gray repeated (one memory)."""
        gray = self._decode_codes(self.codebook(tokens_BL.reshape(-1).long()))
        return gray_to_rgb_01(gray)

    def forward(self, images_01: Tensor) -> ConvVQOutput:
        """Encode, quantise straight-through and decode, with losses.

        Args:
            images_01: [B, 3, S, S] in [0, 1].
        Source: VQ-VAE, arXiv:1711.00937, equation 3.
        """
        latents = self._latents(images_01)
        tokens = self._nearest(latents.detach())
        codes = self.codebook(tokens)
        straight_through = latents + (codes - latents).detach()
        mse = F.mse_loss(self._decode_codes(straight_through), rgb_01_to_gray(images_01))
        codebook_loss = F.mse_loss(codes, latents.detach())
        commitment_loss = F.mse_loss(latents, codes.detach())
        return ConvVQOutput(
            loss=mse + codebook_loss + self.config.commitment_coef * commitment_loss,
            reconstruction_mse=mse.detach(),
            latents=latents.detach(),
            tokens_BL=tokens.view(len(images_01), -1),
        )

    def _latents(self, images_01: Tensor) -> Tensor:
        grid = self.encoder(rgb_01_to_gray(images_01))
        return grid.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, g, g) -> (B*L, C)

    def _nearest(self, latents: Tensor) -> Tensor:
        return nearest_codes(latents, self.codebook.weight)

    def _decode_codes(self, codes: Tensor) -> Tensor:
        side = self.grid_size
        # (B*L, C) -> (B, C, g, g)
        return self.decoder(codes.view(-1, side, side, codes.shape[-1]).permute(0, 3, 1, 2))


def conv_encoder(outer_width: int, inner_width: int, code_dim: int) -> nn.Sequential:
    """Gray images [B, 1, S, S] in -1..1 to latents [B, C, S / 4, S / 4]."""
    return nn.Sequential(
        nn.Conv2d(1, outer_width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(outer_width, inner_width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(inner_width, inner_width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(inner_width, code_dim, 1),
    )


def conv_decoder(code_dim: int, width: int) -> nn.Sequential:
    """Codes [B, C, S / 4, S / 4] to gray images [B, 1, S, S], around -1..1."""
    return nn.Sequential(
        nn.Conv2d(code_dim, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        # All work at token resolution: three times as fast on a CPU as transposed ones.
        nn.Conv2d(width, STRIDE**2, 1),
        nn.PixelShuffle(STRIDE),
    )


def rgb_01_to_gray(images_01: Tensor) -> Tensor:
    """[B, 3, S, S] in 0..1 to the mean of the channels, [B, 1, S, S] in -1..1."""
    return images_01.mean(1, keepdim=True) * 2 - 1


def gray_to_rgb_01(gray: Tensor) -> Tensor:
    """[B, 1, S, S] around -1..1 to [B, 3, S, S] in [0, 1], one memory for all channels."""
    return gray.add(1).mul(0.5).clamp(0, 1).expand(-1, 3, -1, -1)
