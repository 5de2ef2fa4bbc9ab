"""VAR's quantizer: an image as token maps of growing size that add up to one feature map.

Owns the codebook, the convolutions phi that smooth each enlarged map, the greedy residual
search and the inputs of the next scale. Must not know the encoder, the decoder, nor the policy.
All arithmetic is float32, under autocast too: sampling and teacher forcing must see the same
inputs.

Shapes: B images, S scales, p tokens along a side of a scale, n = p^2, m = n of the next scale,
P = p of the last scale, L tokens of all scales, V codebook, C code dimensions.
Source: arXiv:2404.02905, algorithms 1 and 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import ConfigError
from rlgen.tokenizers.codebook import nearest_codes


@dataclass(frozen=True)
class MultiScaleConfig:
    """Sizes of a `MultiScaleQuantizer`."""

    codebook_size: int
    code_dim: int
    patch_nums: tuple[int, ...]
    """Tokens along a side, per scale."""
    num_phi: int = 4
    """Convolutions phi that the scales share: 1 for all, 0 for one each."""
    quant_resi: float = 0.5
    """Weight of phi's convolution against its input; 0 leaves phi out."""

    def __post_init__(self) -> None:
        """Refuse scales that do not grow."""
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        sides = self.patch_nums
        grows = all(a < b for a, b in pairwise(sides))
        if len(sides) < 2 or sides[0] < 1 or not grows:
            raise ConfigError(
                f"patch_nums = {list(sides)} must be two or more positive sides that grow from "
                "scale to scale, such as [1, 2, 3, 4]."
            )
        if self.num_phi < 0:
            raise ConfigError(
                f"num_phi = {self.num_phi} can't be negative; use 4 as published, 1 to share one "
                "convolution, or 0 for one per scale."
            )


class Phi(nn.Conv2d):
    """A blend of the input and its 3x3 convolution."""

    def __init__(self, code_dim: int, ratio: float) -> None:
        super().__init__(code_dim, code_dim, 3, padding=1)
        self.ratio = ratio

    def forward(self, map_BCPP: Tensor) -> Tensor:
        """[B, C, P, P] float32 to the same."""
        mixed = F.conv2d(map_BCPP, self.weight.float(), _float(self.bias), padding=1)
        return map_BCPP * (1 - self.ratio) + mixed * self.ratio


class Quantized(NamedTuple):
    """Codes of a batch and what they were chosen for."""

    tokens_BL: Tensor
    """int64."""
    residuals_BLC: Tensor
    """What was left of the latent, at the scale's size, when each code was searched."""


class MultiScaleQuantizer(nn.Module):
    """Codes of all scales to and from one feature map; tensors are named as in VAR's VAE."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_nums = config.patch_nums
        self.num_scales = len(config.patch_nums)
        self.block_sizes = tuple(side**2 for side in config.patch_nums)
        self.num_tokens = sum(self.block_sizes)
        self.codebook_size = config.codebook_size
        self.code_dim = config.code_dim
        self.phi_index = phi_index(self.num_scales, config.num_phi)
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        ratio = abs(config.quant_resi)
        phis = [
            Phi(config.code_dim, ratio) if ratio > 1e-6 else nn.Identity()
            for _ in range(config.num_phi or self.num_scales)
        ]
        self.quant_resi = _named_phis(phis, config.num_phi)
        self._phi_of_scale = tuple(phis[index] for index in self.phi_index)

    def embed_step(
        self, f_hat_BCPP: Tensor | None, tokens_Bn: Tensor, scale: int
    ) -> tuple[Tensor, Tensor | None]:
        """Add the codes of one scale to the feature map.

        Args:
            f_hat_BCPP: sum of the scales before; None at scale 0. It is not changed.
            tokens_Bn: int64 codes of the scale, in raster order.
            scale: which one, from 0.
        Returns:
            The new map [B, C, P, P] float32, and the inputs [B, m, C] of the next scale: the map
            averaged down to its size, in raster order; None after the last scale.
        """
        with _float32_only(tokens_Bn):
            step_BCPP = self._contribution(tokens_Bn, scale)
            f_hat_BCPP = step_BCPP if f_hat_BCPP is None else f_hat_BCPP.float() + step_BCPP
            if scale + 1 == self.num_scales:
                return f_hat_BCPP, None
            return f_hat_BCPP, self._at_scale(f_hat_BCPP, scale + 1)

    def inputs_of(self, tokens_BL: Tensor) -> Tensor:
        """Teacher-forced inputs of scales 1 to S - 1: [B, L - patch_nums[0]^2, C] float32."""
        steps = islice(self._steps(tokens_BL), self.num_scales - 1)
        return torch.cat([inputs for _, inputs in steps if inputs is not None], 1)

    def f_hat(self, tokens_BL: Tensor) -> Tensor:
        """The feature map of all scales: [B, C, P, P] float32."""
        *_, (f_hat_BCPP, _) = self._steps(tokens_BL)
        return f_hat_BCPP

    def partial_sums(self, tokens_BL: Tensor) -> list[Tensor]:
        """The feature map after each scale: S of [B, C, P, P] float32, differentiable."""
        return [f_hat_BCPP for f_hat_BCPP, _ in self._steps(tokens_BL)]

    def encode(self, latent_BCPP: Tensor) -> Tensor:
        """Greedy residual codes, coarse to fine: int64 [B, L]; see `quantize`."""
        return self.quantize(latent_BCPP).tokens_BL

    @torch.no_grad()
    def quantize(self, latent_BCPP: Tensor) -> Quantized:
        """Choose codes scale by scale, each for what the scales before it have left.

        The search takes plain squared distances; nothing is normalised.
        """
        tokens, residuals = [], []
        with _float32_only(latent_BCPP):
            rest_BCPP = latent_BCPP.float()
            for scale in range(self.num_scales):
                rest_BnC = self._at_scale(rest_BCPP, scale)
                tokens_Bn = nearest_codes(rest_BnC.flatten(0, 1), self.embedding.weight)
                tokens_Bn = tokens_Bn.view(rest_BnC.shape[:2])
                rest_BCPP = rest_BCPP - self._contribution(tokens_Bn, scale)
                tokens.append(tokens_Bn)
                residuals.append(rest_BnC)
        return Quantized(torch.cat(tokens, 1), torch.cat(residuals, 1))

    def _steps(self, tokens_BL: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        f_hat_BCPP = None
        for scale, tokens_Bn in enumerate(tokens_BL.split(self.block_sizes, dim=1)):
            f_hat_BCPP, inputs = self.embed_step(f_hat_BCPP, tokens_Bn, scale)
            yield f_hat_BCPP, inputs

    def _contribution(self, tokens_Bn: Tensor, scale: int) -> Tensor:
        """phi of the scale's codes, enlarged: [B, C, P, P]."""
        side, last = self.patch_nums[scale], self.patch_nums[-1]
        # (B, n, C) -> (B, C, p, p)
        map_BCpp = self.embedding(tokens_Bn.long()).float().mT.unflatten(2, (side, side))
        if side != last:
            map_BCpp = F.interpolate(map_BCpp, size=(last, last), mode="bicubic")
        # Contiguous, because the nets lose precision in the channels-last layout.
        return self._phi_of_scale[scale](map_BCpp).contiguous()

    def _at_scale(self, map_BCPP: Tensor, scale: int) -> Tensor:
        """The map averaged down to a scale's size, in raster order: [B, n, C]."""
        side = self.patch_nums[scale]
        if side != self.patch_nums[-1]:
            map_BCPP = F.interpolate(map_BCPP, size=(side, side), mode="area")
        return map_BCPP.flatten(2).mT


def phi_index(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which phi each scale uses, as VAR's public weights were trained.

    The phis stand at ticks in 0..1, and scale i takes the one nearest to i / (S - 1). Of ten
    scales, two lie halfway between ticks of four: float64 rounding decides, so the ticks are
    computed by numpy's linspace, as they were for the weights.
    """
    if num_phi == 1:
        return (0,) * num_scales
    count = num_phi or num_scales
    # Four phis stand further out than the rule for all other counts puts them.
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    positions = (scale / (num_scales - 1) for scale in range(num_scales))
    return tuple(int(np.argmin(np.abs(ticks - position))) for position in positions)


def _named_phis(phis: Sequence[nn.Module], num_phi: int) -> nn.Module:
    """Hold the phis under their public names, which depend on how they are shared."""
    if num_phi == 0:
        return nn.ModuleList(phis)
    if num_phi == 1:
        return nn.ModuleDict({"qresi": phis[0]})
    return nn.ModuleDict({"qresi_ls": nn.ModuleList(phis)})


def _float32_only(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
