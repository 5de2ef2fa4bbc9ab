"""DINOv2's vision transformer, a feature space that knows no classes.

Owns the architecture under its public names and its preprocessing: both sides to 224 pixels as
Pillow does it, and ImageNet's mean and std. Must not know distances.

Shapes: B images, N = 1 + patches, D width, H heads.
Source: dinov2_vitl14_pretrain.pth of facebookresearch/dinov2 (arXiv:2304.07193); the
preprocessing is that of the FD-DINOv2 of arXiv:2306.04675.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import CheckpointError
from rlgen.features.outputs import ExtractorOutputs
from rlgen.features.preprocess import Preprocess
from rlgen.nn.weights import load_state, state_sha256

KEYS = ("cls_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma")
"""Tell a DINOv2 among weight files."""
IMAGE_SIZE = 224
_HEAD_WIDTH = 64
_EPS = 1e-6
_POSITION_OFFSET = 0.1
"""Added to the grid before the position table is resized: the published code did so against
rounding, and the interpolation's step follows from it."""
_BATCH_SIZE = 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """Sizes of a `DinoVisionTransformer`; ViT-L/14 by default."""

    width: int = 1024
    num_blocks: int = 24
    num_heads: int = 16
    patch_size: int = 14
    hidden: int = 4096
    table_size: int = 37
    """Patches along a side of the stored position table (518 pixels)."""


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        # (B, N, 3 * D) -> (3, B, H, N, D / H)
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        # (B, H, N, D / H) -> (B, N, D)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """x + gamma * attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = _Attention(width, config.num_heads)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = _Mlp(width, config.hidden)
        self.ls2 = _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        # (B, D, h, w) -> (B, h * w, D)
        return self.proj(pixels).flatten(2).transpose(1, 2)


class DinoVisionTransformer(nn.Module):
    """Pixels to the normalised class token; tensors keep their public names."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.table_size**2, config.width))
        self.patch_embed = _PatchEmbed(config.width, config.patch_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width, eps=_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W], multiples of the patch, to [B, D]."""
        patches = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        size = self.config.patch_size
        x = x + self.positions(pixels.shape[-2] // size, pixels.shape[-1] // size)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table [1, 1 + rows * columns, D] for a grid of patches."""
        side = self.config.table_size
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + _POSITION_OFFSET) / side, (columns + _POSITION_OFFSET) / side)
        resized = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


class DinoExtractor:
    """The class token after the last norm, of images at 224 x 224."""

    def __init__(self, net: DinoVisionTransformer) -> None:
        self.net = net.requires_grad_(False).eval()
        self.num_features = net.config.width
        size = IMAGE_SIZE - IMAGE_SIZE % net.config.patch_size
        self.preprocess = Preprocess((size, size), _MEAN, _STD, resize_mode="squash")
        digest = state_sha256(net.state_dict())
        name = f"dinov2-{net.config.width}x{net.config.num_blocks}"
        self.feature_space = f"{name}:u8-pil-bicubic-squash-{size}:{digest[:16]}"

    @torch.inference_mode()
    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to float32 [B, D]."""
        return torch.cat(
            [self.net(self.preprocess(part)).float() for part in images_01.split(_BATCH_SIZE)]
        )

    def outputs(self, images_01: Tensor) -> ExtractorOutputs:
        """Features alone."""
        return ExtractorOutputs(self(images_01))


def dinov2_from_state(
    state: Mapping[str, Tensor], location: str, device: torch.device | str = "cpu"
) -> DinoExtractor:
    """Build the extractor from a published state, whose shapes tell the sizes.

    Raises:
        CheckpointError: register tokens, the gated MLP of ViT-g, or tensors that do not fit.
    """
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        kind = "register tokens" if "register_tokens" in state else "a gated MLP (ViT-g)"
        raise CheckpointError(
            f"{location} is a DINOv2 with {kind}, which rlgen does not have; name "
            "dinov2_vitl14_pretrain.pth, or the ViT-S or ViT-B of the same release."
        )
    net = DinoVisionTransformer(_read_config(state, location))
    # The mask token stands for hidden patches in training.
    kept = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    load_state(net, kept, location)
    return DinoExtractor(net.to(device))


def _read_config(state: Mapping[str, Tensor], location: str) -> DinoConfig:
    try:
        width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        table_size = math.isqrt(state["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{location} lacks tensors of a DINOv2 ({error}); name dinov2_vitl14_pretrain.pth."
        ) from None
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    return DinoConfig(
        width=width,
        num_blocks=1 + max(int(found[1]) for found in blocks if found),
        num_heads=max(width // _HEAD_WIDTH, 1),
        patch_size=patch_size,
        hidden=hidden,
        table_size=table_size,
    )
