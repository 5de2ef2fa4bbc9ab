"""Tokenizers whose image is one grid of codes: what LlamaGen's and taming's have in common.

Owns the codebook and the way through the nets; the families add their sizes and names.
Images of any size that the nets can halve go through `latents`, `encode_grid` and `decode_grid`;
`encode` and `decode` keep to the configured size.

Shapes: B images, H and W sides of an image, h and w sides of its grid, S configured side of an
image, L tokens of it, V codebook, C code dimensions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import ConfigError
from rlgen.nn.weights import load_state
from rlgen.tokenizers.autoencoder import Layout, Sizes, build_decoder, build_encoder
from rlgen.tokenizers.codebook import nearest_codes


class Codebook(nn.Module):
    """The table of codes."""

    def __init__(self, codebook_size: int, code_dim: int, *, has_unit_length: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.has_unit_length = has_unit_length
        """Whether latents and codes are normalised at each use; the stored table is not."""

    def search(self, latents_BChw: Tensor) -> Tensor:
        """The nearest codes: int64 [B, h, w]."""
        # (B, C, h, w) -> (B*h*w, C)
        latents_NC = latents_BChw.movedim(1, -1).flatten(0, 2)
        nearest_N = nearest_codes(self._scaled(latents_NC), self._scaled(self.embedding.weight))
        return nearest_N.view(len(latents_BChw), *latents_BChw.shape[2:])

    def look_up(self, tokens_Bhw: Tensor) -> Tensor:
        """The codes as a map: [B, C, h, w]."""
        # Contiguous, because the nets lose precision in the channels-last layout.
        return self._scaled(self.embedding(tokens_Bhw.long())).movedim(-1, 1).contiguous()

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.has_unit_length else vectors


class GridVQ(nn.Module):
    """Encoder, 1x1 convolution to the codes' dimensions, codebook, and back."""

    strays: frozenset[str] = frozenset()
    """What public files hold beside the weights."""

    def __init__(
        self,
        layout: Layout,
        *,
        encoder: Sizes,
        decoder: Sizes,
        codebook_size: int,
        code_dim: int,
        has_unit_length: bool,
        image_size: int,
    ) -> None:
        super().__init__()
        stride = 2 ** (len(encoder.ch_mult) - 1)
        if image_size % stride or len(encoder.ch_mult) != len(decoder.ch_mult):
            raise ConfigError(
                f"a side of {image_size} pixels can't be halved {len(encoder.ch_mult) - 1} times "
                f"and doubled {len(decoder.ch_mult) - 1} times; use a multiple of {stride}, and as "
                "many ch_mult in the encoder as in the decoder."
            )
        self.image_size = image_size
        self.grid_size = image_size // stride
        self.num_tokens = self.grid_size**2
        self.codebook_size = codebook_size
        self.encoder = build_encoder(layout, encoder)
        self.quant_conv = nn.Conv2d(encoder.z_channels, code_dim, 1)
        self.quantize = Codebook(codebook_size, code_dim, has_unit_length=has_unit_length)
        self.post_quant_conv = nn.Conv2d(code_dim, decoder.z_channels, 1)
        self.decoder = build_decoder(layout, decoder)

    @torch.no_grad()
    def encode(self, images_01: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to codes in raster order: int64 [B, L]."""
        return self.encode_grid(images_01).reshape(len(images_01), self.num_tokens)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Codes [B, L] to float32 images [B, 3, S, S] in [0, 1]."""
        pixels = self.decode_grid(tokens_BL.unflatten(1, (self.grid_size, self.grid_size)))
        return pixels.float().add_(1).mul_(0.5).clamp_(0, 1)

    def latents(self, images_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to what the codes are searched for, unscaled: [B, C, h, w]."""
        return self.quant_conv(self.encoder(images_01 * 2 - 1))

    def encode_grid(self, images_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to codes: int64 [B, h, w]."""
        return self.quantize.search(self.latents(images_01))

    def decode_grid(self, tokens_Bhw: Tensor) -> Tensor:
        """Codes [B, h, w] to pixels [B, 3, H, W], around -1..1 and not clamped."""
        return self.decoder(self.post_quant_conv(self.quantize.look_up(tokens_Bhw)))

    def load_public_state_dict(
        self, state: Mapping[str, Tensor], location: str = "the state dict"
    ) -> None:
        """Load weights under their published names, which are this module's own.

        Args:
            location: where the state came from, for the message.
        Raises:
            CheckpointError: names the missing, unexpected and mis-shaped tensors.
        """
        load_state(self, {k: v for k, v in state.items() if k not in self.strays}, location)
