"""taming-transformers' VQGAN, under the public weight names.

Owns its sizes and names. A Lightning checkpoint's prefix and its loss networks are its loader's
matter. The published f16 models are the defaults below, with 1024 or 16384 codes.
Source: arXiv:2012.09841; CompVis/taming-transformers, taming/models/vqgan.py.
"""

from dataclasses import dataclass, replace

from rlgen.errors import ConfigError
from rlgen.tokenizers.autoencoder import Layout, Sizes
from rlgen.tokenizers.grid_vq import GridVQ

_LAYOUT = Layout(
    encoder_level="down.{level}",
    decoder_level="up.{level}",
    block="block",
    middle=("block_1", "attn_1", "block_2"),
)


@dataclass(frozen=True)
class TamingVQGANConfig:
    """Sizes, named as published."""

    n_embed: int = 1024
    """Codes."""
    embed_dim: int = 256
    """Dimensions of a code."""
    resolution: int = 256
    """Side of the image in pixels."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Levels with attention, by the side of their maps at `resolution`."""
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False
    """Whether the encoder gives a mean and a variance; a VQGAN can't use them."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what belongs to another model."""
        if self.double_z:
            raise ConfigError(
                f"double_z makes the encoder give {2 * self.z_channels} channels, but a VQGAN's "
                f"quant_conv takes {self.z_channels}; set double_z to false."
            )


class TamingVQGAN(GridVQ):
    """Attention stands where the configured resolution says, whatever the size of an image."""

    def __init__(self, config: TamingVQGANConfig) -> None:
        levels = range(len(config.ch_mult))
        sizes = Sizes(
            ch=config.ch,
            ch_mult=config.ch_mult,
            num_res_blocks=config.num_res_blocks,
            z_channels=config.z_channels,
            attention_levels={
                level
                for level in levels
                if config.resolution // 2**level in config.attn_resolutions
            },
            image_channels=config.in_channels,
            dropout=config.dropout,
        )
        super().__init__(
            _LAYOUT,
            encoder=sizes,
            decoder=replace(sizes, image_channels=config.out_ch),
            codebook_size=config.n_embed,
            code_dim=config.embed_dim,
            has_unit_length=False,
            image_size=config.resolution,
        )
        self.config = config
