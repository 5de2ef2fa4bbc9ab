"""VAR's multi-scale VQ-VAE, under the public weight names.

Owns its sizes and names; the scales are multiscale.py's. The published vae_ch160v4096z32.pth has
the sizes of the defaults below; at 512 pixels it is used with the scales
1, 2, 3, 4, 6, 9, 13, 18, 24, 32.

Shapes: B images, S side of an image, L tokens of all scales, C code dimensions, P side of the
last scale.
Source: arXiv:2404.02905; FoundationVision/VAR, models/vqvae.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlgen.nn.weights import load_state
from rlgen.tokenizers.autoencoder import Layout, Sizes, build_decoder, build_encoder
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer

_LAYOUT = Layout(
    encoder_level="down.{level}",
    decoder_level="up.{level}",
    block="block",
    middle=("block_1", "attn_1", "block_2"),
    has_fused_qkv=True,
)
_CH_MULT = (1, 1, 2, 2, 4)
_STRIDE = 2 ** (len(_CH_MULT) - 1)
_STRAYS = {"quantize.ema_vocab_hit_SV"}
"""How often its training used each code."""


@dataclass(frozen=True)
class VarVQVAEConfig:
    """Sizes, named as published."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Tokens along a side, per scale; the image's side is 16 times the last."""
    vocab_size: int = 4096
    z_channels: int = 32
    """C: dimensions of a code, and of the encoder's output."""
    ch: int = 160
    share_quant_resi: int = 4
    """Convolutions phi that the scales share: 1 for all, 0 for one each."""
    quant_resi: float = 0.5
    """Weight of phi's convolution against its input."""


class VarVQVAE(nn.Module):
    """Images to codes of growing maps and back."""

    def __init__(self, config: VarVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        sizes = Sizes(
            ch=config.ch,
            ch_mult=_CH_MULT,
            num_res_blocks=2,
            z_channels=config.z_channels,
            attention_levels={len(_CH_MULT) - 1},
        )
        self.encoder = build_encoder(_LAYOUT, sizes)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.quantize = MultiScaleQuantizer(
            MultiScaleConfig(
                codebook_size=config.vocab_size,
                code_dim=config.z_channels,
                patch_nums=config.patch_nums,
                num_phi=config.share_quant_resi,
                quant_resi=config.quant_resi,
            )
        )
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.decoder = build_decoder(_LAYOUT, sizes)
        self.image_size = _STRIDE * config.patch_nums[-1]
        self.num_tokens = self.quantize.num_tokens
        self.codebook_size = config.vocab_size

    @torch.no_grad()
    def encode(self, images_01: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to codes of all scales, coarse to fine: int64 [B, L]."""
        return self.quantize.encode(self.latents(images_01))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Codes [B, L] to float32 images [B, 3, S, S] in [0, 1]."""
        return self.decode_map(self.quantize.f_hat(tokens_BL)).float().add_(1).mul_(0.5)

    def latents(self, images_01: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to what the scales add up to: [B, C, P, P]."""
        return self.quant_conv(self.encoder(images_01 * 2 - 1))

    def decode_map(self, f_hat_BCPP: Tensor) -> Tensor:
        """The sum of all scales to pixels [B, 3, S, S], clamped to -1..1."""
        return self.decoder(self.post_quant_conv(f_hat_BCPP)).clamp(-1, 1)

    def load_public_state_dict(
        self, state: Mapping[str, Tensor], location: str = "the state dict"
    ) -> None:
        """Load weights under their published names, which are this module's own.

        Args:
            location: where the state came from, for the message.
        Raises:
            CheckpointError: names the missing, unexpected and mis-shaped tensors.
        """
        load_state(self, {k: v for k, v in state.items() if k not in _STRAYS}, location)
