"""The building blocks of a VAR transformer, under their public weight names.

Owns attention over whole scales, the feed-forward, and the normalisation whose scale and shift
come from the condition. The residual stream, the normalisations and the modulation are float32,
whatever the weights are and under autocast too; only the matrix products take a lower format.

Shapes: B batch, T positions of this call, H heads, K head width, D = H*K width.
Source: arXiv:2404.02905; the modulated normalisation is that of DiT, arXiv:2212.09748.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.nn.cache import LayerCache

_MAX_LOG_SCALE = math.log(100.0)
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_GELU: tuple[str, list[None], str] = ("gelu", [], "tanh")
_NOTHING: tuple[str, list[None], str] = ("none", [], "")
"""What oneDNN does after a product."""


@dataclass
class Prefix:
    """A layer's cache of which `length` positions are filled."""

    cache: LayerCache
    length: int


class Modulation(NamedTuple):
    """What the condition does to a block; each [B, 1, D] float32."""

    attention_gate: Tensor
    ffn_gate: Tensor
    attention_scale: Tensor
    """Around 1, as is the other scale."""
    ffn_scale: Tensor
    attention_shift: Tensor
    ffn_shift: Tensor


class ConditionLinear(nn.Sequential):
    """SiLU and a linear layer, from the condition to several vectors; the layer's name is `1`."""

    def __init__(self, width: int, num_vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, num_vectors * width))
        self.num_vectors = num_vectors

    @property
    def linear(self) -> nn.Linear:
        """The layer."""
        layer = self[1]
        assert isinstance(layer, nn.Linear), layer
        return layer

    def forward(self, condition_BD: Tensor) -> Tensor:
        """[B, D] -> [B, 1, num_vectors, D] float32."""
        hidden_BD = F.silu(condition_BD.float()).to(self.linear.bias.dtype)
        vectors = self.linear(hidden_BD)
        return vectors.float().view(len(vectors), 1, self.num_vectors, -1)


class ScaleAttention(nn.Module):
    """Attention of each position to its own scale and all earlier ones; keys have no bias."""

    def __init__(self, width: int, heads: int, *, has_unit_vectors: bool) -> None:
        """Make the layer.

        Args:
            width: D.
            heads: H.
            has_unit_vectors: queries and keys have length 1, and each head a learned factor.
        """
        super().__init__()
        self.heads = heads
        self.has_unit_vectors = has_unit_vectors
        # Without unit vectors a quarter of the usual factor, as the family was trained.
        self.softmax_scale = 1.0 if has_unit_vectors else 0.25 / math.sqrt(width // heads)
        if has_unit_vectors:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, ends: Sequence[int], prefix: Prefix | None = None) -> Tensor:
        """Attend scale by scale, each to all positions before its end.

        One call per scale needs no mask, so the fastest kernels serve; it skips what a mask
        would blank, and does what cached decoding does.

        Args:
            x_BTD: inputs of one or more whole scales.
            ends: one past the last position of each of these scales, counted within x_BTD.
            prefix: keys and values of the positions before, which receives these; None if
                x_BTD begins with the first scale.
        """
        batch, length, width = x_BTD.shape
        query, key, value = self._project(x_BTD)
        num_before = 0
        if prefix is not None:
            num_before = prefix.length
            end = num_before + length
            prefix.cache.keys[:, :, num_before:end] = key
            prefix.cache.values[:, :, num_before:end] = value
            key, value = prefix.cache.keys, prefix.cache.values
        mixed = [
            F.scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, : num_before + end],
                value[:, :, : num_before + end],
                scale=self.softmax_scale,
            )
            for begin, end in zip((0, *ends[:-1]), ends, strict=True)
        ]
        mixed_BHTK = torch.cat(mixed, dim=2) if len(mixed) > 1 else mixed[0]
        mixed_BTD = mixed_BHTK.transpose(1, 2).reshape(batch, length, width)
        return linear(mixed_BTD, self.proj.weight, self.proj.bias)

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, T, K]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x_BTD.to(bias.dtype), self.mat_qkv.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).unbind(dim=2)  # (B, T, H, K)
        if self.has_unit_vectors:
            factor_H1 = self.scale_mul_1H11.float().clamp_max(_MAX_LOG_SCALE).exp().view(-1, 1)
            query = (F.normalize(query.float(), dim=-1) * factor_H1).to(value.dtype)
            key = F.normalize(key.float(), dim=-1).to(value.dtype)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between, in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape."""
        bias = self.fc1.bias
        hidden = linear(x.to(bias.dtype), self.fc1.weight, bias, has_gelu=True)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class ScaleBlock(nn.Module):
    """Attention and feed-forward, normalised and gated by the condition."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        ffn_width: int,
        norm_eps: float,
        has_unit_vectors: bool,
        has_own_modulation: bool,
    ) -> None:
        """Make the block.

        Args:
            width: D.
            heads: H.
            ffn_width: hidden numbers of the feed-forward.
            norm_eps: of both normalisations, which have no weights.
            has_unit_vectors: see ScaleAttention.
            has_own_modulation: project the condition here; else only add to a shared projection.
        """
        super().__init__()
        self.norm_eps = norm_eps
        self.has_own_modulation = has_own_modulation
        self.attn = ScaleAttention(width, heads, has_unit_vectors=has_unit_vectors)
        self.ffn = FeedForward(width, ffn_width)
        if has_own_modulation:
            self.ada_lin = ConditionLinear(width, 6)
        else:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))

    def forward(self, x_BTD: Tensor, condition: Tensor, ends: Sequence[int]) -> Tensor:
        """One layer over all scales; `condition` is what `modulation` takes."""
        return self.run(x_BTD, self.modulation(condition), ends)

    def modulation(self, condition: Tensor) -> Modulation:
        """What the condition does here; the same for all positions.

        Args:
            condition: [B, D], or the shared projection [B, 1, 6, D].
        """
        vectors_B16D = (
            self.ada_lin(condition) if self.has_own_modulation else condition + self.ada_gss.float()
        )
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors_B16D.unbind(dim=2)
        return Modulation(gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2)

    def shrink(self, *, residual: float, gates: float, modulation: float) -> None:
        """Multiply initial weights, so that the block does little at first.

        Args:
            residual: for the layers whose outputs are added to the residual stream.
            gates: for what makes the gates.
            modulation: for what makes the other scales, and the shifts.
        """
        with torch.no_grad():
            self.attn.proj.weight.mul_(residual)
            self.ffn.fc2.weight.mul_(residual)
            if self.has_own_modulation:
                weight_6DD = self.ada_lin.linear.weight.unflatten(0, (6, -1))
            else:
                weight_6DD = self.ada_gss[0, 0]
            weight_6DD[:2].mul_(gates)  # the vectors come in the order of Modulation
            weight_6DD[2:].mul_(modulation)

    def run(
        self,
        x_BTD: Tensor,
        modulation: Modulation,
        ends: Sequence[int],
        prefix: Prefix | None = None,
    ) -> Tensor:
        """One layer with a known modulation; see ScaleAttention for the other arguments."""
        m = modulation
        normed = modulated_norm(x_BTD, m.attention_scale, m.attention_shift, eps=self.norm_eps)
        x_BTD = torch.addcmul(x_BTD, self.attn(normed, ends, prefix).float(), m.attention_gate)
        normed = modulated_norm(x_BTD, m.ffn_scale, m.ffn_shift, eps=self.norm_eps)
        return torch.addcmul(x_BTD, self.ffn(normed).float(), m.ffn_gate)


class ModulatedNorm(nn.Module):
    """The normalisation before the head."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = ConditionLinear(width, 2)

    def modulation(self, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, around 1, and shift: [B, 1, D] float32 each."""
        scale, shift = self.ada_lin(condition_BD).unbind(dim=2)
        return 1 + scale, shift

    def forward(self, x_BTD: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, D] float32 to the same."""
        return modulated_norm(x_BTD, *modulation, eps=self.eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, has_gelu: bool = False) -> Tensor:
    """A linear layer, with a GELU in its tanh form after it if `has_gelu`.

    Where no gradient is wanted, float32 on a CPU is handed to oneDNN: PyTorch's own choice, MKL,
    takes twice as long on processors that are not Intel's.
    """
    is_float32_on_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    is_traced = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if is_float32_on_cpu and _HAS_ONEDNN and not is_traced:
        after = _GELU if has_gelu else _NOTHING
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if has_gelu else out


def modulated_norm(x_BTD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, *, eps: float) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift; float32."""
    normed_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=eps)
    return torch.addcmul(shift_B1D, normed_BTD, scale_B1D)
