"""LlamaGen's VQ tokenizer, under the public weight names.

Owns its sizes and names. The published files are VQ-16 (vq_ds16_*.pt, the defaults below) and
VQ-8 (vq_ds8_*.pt, both ch_mult 1, 2, 2, 4).
Source: arXiv:2406.06525; FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
"""

from dataclasses import dataclass

from rlgen.tokenizers.autoencoder import Layout, Sizes
from rlgen.tokenizers.grid_vq import GridVQ

_LAYOUT = Layout(
    encoder_level="conv_blocks.{level}",
    decoder_level="conv_blocks.{step}",
    block="res",
    middle=("0", "1", "2"),
)


@dataclass(frozen=True)
class LlamaGenVQConfig:
    """Sizes, named as published."""

    image_size: int = 256
    """Side in pixels, a multiple of the stride; the weights fit any."""
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    """Whether latents and codes are normalised at each use."""
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    ch: int = 128
    num_res_blocks: int = 2
    dropout_p: float = 0.0


class LlamaGenVQ(GridVQ):
    """Attention stands at the coarsest level; codes have unit length."""

    # A record of recently used codes, for the logs of its training.
    strays = frozenset({"quantize.codebook_used"})

    def __init__(self, config: LlamaGenVQConfig) -> None:
        def sizes(ch_mult: tuple[int, ...]) -> Sizes:
            return Sizes(
                ch=config.ch,
                ch_mult=ch_mult,
                num_res_blocks=config.num_res_blocks,
                z_channels=config.z_channels,
                attention_levels={len(ch_mult) - 1},
                dropout=config.dropout_p,
            )

        super().__init__(
            _LAYOUT,
            encoder=sizes(config.encoder_ch_mult),
            decoder=sizes(config.decoder_ch_mult),
            codebook_size=config.codebook_size,
            code_dim=config.codebook_embed_dim,
            has_unit_length=config.codebook_l2_norm,
            image_size=config.image_size,
        )
        self.config = config
