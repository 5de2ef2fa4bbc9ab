"""The convolutional encoder and decoder that LlamaGen's, taming's and VAR's tokenizers share.

Owns the blocks and the names of their tensors: each family's public names are the names here,
so its weight files load and save as they are. Must not know codebooks.

Both nets are straight chains: level 0 has the full resolution, each further level half of it,
and a middle block stands at the coarsest.
Shapes: B images, C channels, H and W sides of a map, T = H * W.
Source: arXiv:2012.09841, and the implementations in CompVis/taming-transformers,
FoundationVision/LlamaGen and FoundationVision/VAR.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import ConfigError

_NORM_GROUPS = 32
_NORM_EPS = 1e-6

Steps = list[tuple[str, nn.Module]]
"""Modules in the order that they run in, with dotted names."""


@dataclass(frozen=True)
class Layout:
    """What a family calls the parts; {level} counts from full resolution, {step} as run."""

    encoder_level: str
    decoder_level: str
    block: str
    middle: tuple[str, str, str]
    has_fused_qkv: bool = False
    """Whether one convolution makes queries, keys and values."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of an encoder or a decoder."""

    ch: int
    """Channels at full resolution."""
    ch_mult: tuple[int, ...]
    """Channels of each level, as multiples of ch."""
    num_res_blocks: int
    """Residual blocks per level of the encoder; the decoder has one more."""
    z_channels: int
    attention_levels: Collection[int]
    """Levels with attention after every residual block; the middle always has it."""
    image_channels: int = 3
    dropout: float = 0.0
    """In training alone."""


class Chain(nn.Module):
    """Modules run one after another under any dotted names."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        for name, module in steps:
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, module)
        self._steps = tuple(module for _, module in steps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply all modules."""
        for step in self._steps:
            x_BCHW = step(x_BCHW)
        return x_BCHW


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = _conv3(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3(channels_out, channels_out)
        self.nin_shortcut = (
            nn.Identity() if channels_in == channels_out else _conv1(channels_in, channels_out)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x_BCHW), inplace=True))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden), inplace=True)))
        return self.nin_shortcut(x_BCHW) + hidden


class AttentionBlock(nn.Module):
    """Single-head attention of all positions to all, beside a shortcut."""

    def __init__(self, channels: int, *, has_fused_qkv: bool) -> None:
        super().__init__()
        self.has_fused_qkv = has_fused_qkv
        self.scale = channels**-0.5
        self.norm = _norm(channels)
        if has_fused_qkv:
            self.qkv = _conv1(channels, 3 * channels)
        else:
            self.q = _conv1(channels, channels)
            self.k = _conv1(channels, channels)
            self.v = _conv1(channels, channels)
        self.proj_out = _conv1(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        normed = self.norm(x_BCHW)
        if self.has_fused_qkv:
            maps = self.qkv(normed).chunk(3, dim=1)
        else:
            maps = (self.q(normed), self.k(normed), self.v(normed))
        q_BCT, k_BCT, v_BCT = (one.flatten(2) for one in maps)
        # Not the fused attention: its other order of sums, enlarged by the decoder, would use up
        # most of what float32 leaves between this and the published numbers.
        scores_BTT = torch.bmm(q_BCT.mT, k_BCT) * self.scale
        attended_BCT = torch.bmm(v_BCT, scores_BTT.softmax(-1).mT)
        return x_BCHW + self.proj_out(attended_BCT.unflatten(2, x_BCHW.shape[2:]))


def build_encoder(layout: Layout, sizes: Sizes) -> Chain:
    """Images [B, image_channels, H, W] to [B, z_channels, H / f, W / f], f = 2^(levels - 1)."""
    width = sizes.ch
    steps: Steps = [("conv_in", _conv3(sizes.image_channels, width))]
    for level, multiple in enumerate(sizes.ch_mult):
        name = layout.encoder_level.format(level=level, step=level)
        width_in, width = width, sizes.ch * multiple
        steps += _level(layout, sizes, name, level, (width_in, width), sizes.num_res_blocks)
        if level + 1 < len(sizes.ch_mult):
            steps += [
                (f"{name}.downsample.pad", nn.ZeroPad2d((0, 1, 0, 1))),
                (f"{name}.downsample.conv", nn.Conv2d(width, width, 3, stride=2)),
            ]
    return Chain(steps + _middle(layout, sizes, width) + _end(width, sizes.z_channels))


def build_decoder(layout: Layout, sizes: Sizes) -> Chain:
    """Maps [B, z_channels, h, w] to images [B, image_channels, h * f, w * f]."""
    width = sizes.ch * sizes.ch_mult[-1]
    steps: Steps = [("conv_in", _conv3(sizes.z_channels, width)), *_middle(layout, sizes, width)]
    for step, level in enumerate(reversed(range(len(sizes.ch_mult)))):
        name = layout.decoder_level.format(level=level, step=step)
        width_in, width = width, sizes.ch * sizes.ch_mult[level]
        steps += _level(layout, sizes, name, level, (width_in, width), sizes.num_res_blocks + 1)
        if level > 0:
            steps += [
                (f"{name}.upsample.enlarge", nn.Upsample(scale_factor=2, mode="nearest")),
                (f"{name}.upsample.conv", _conv3(width, width)),
            ]
    return Chain(steps + _end(width, sizes.image_channels))


def _level(
    layout: Layout, sizes: Sizes, name: str, level: int, widths: tuple[int, int], num_blocks: int
) -> Steps:
    width_in, width = widths
    steps: Steps = []
    for index in range(num_blocks):
        block = ResnetBlock(width if index else width_in, width, sizes.dropout)
        steps.append((f"{name}.{layout.block}.{index}", block))
        if level in sizes.attention_levels:
            attention = AttentionBlock(width, has_fused_qkv=layout.has_fused_qkv)
            steps.append((f"{name}.attn.{index}", attention))
    return steps


def _middle(layout: Layout, sizes: Sizes, width: int) -> Steps:
    modules = (
        ResnetBlock(width, width, sizes.dropout),
        AttentionBlock(width, has_fused_qkv=layout.has_fused_qkv),
        ResnetBlock(width, width, sizes.dropout),
    )
    return [(f"mid.{name}", part) for name, part in zip(layout.middle, modules, strict=True)]


def _end(width: int, channels_out: int) -> Steps:
    return [
        ("norm_out", _norm(width)),
        ("act_out", nn.SiLU(inplace=True)),
        ("conv_out", _conv3(width, channels_out)),
    ]


def _norm(channels: int) -> nn.GroupNorm:
    if channels % _NORM_GROUPS:
        raise ConfigError(
            f"a level with {channels} channels can't be normalised in {_NORM_GROUPS} groups; make "
            f"ch times each of its multiples divisible by {_NORM_GROUPS}."
        )
    return nn.GroupNorm(_NORM_GROUPS, channels, eps=_NORM_EPS)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def _conv1(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1)
