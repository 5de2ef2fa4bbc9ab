"""Causal self-attention with a static key-value cache, and the gated feed-forward.

Owns the two building blocks of a LlamaGen transformer, under their public weight names.
Shapes: B batch, T positions of this call, H heads, K head width, D = H*K width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.nn.rotary import apply_rotary


@dataclass
class LayerCache:
    """Keys and values of one layer, allocated once: [B, H, T_max, K] each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        heads: int,
        length: int,
        head_width: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "LayerCache":
        """Make an empty cache."""
        shape = (batch, heads, length, head_width)
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )


class RotaryAttention(nn.Module):
    """Multi-head causal attention with rotary positions; fused `wqkv`, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, table: Tensor, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """Attend to all earlier positions.

        Args:
            x_BTD: inputs at positions start .. start+T-1.
            table: [T, K/2, 2] rotary rows of these positions.
            cache: holds positions before `start` and receives these; None for one full pass.
            start: first position; with a cache, T must be 1 or start 0.
        """
        batch, length, width = x_BTD.shape
        qkv = self.wqkv(x_BTD).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(dim=2)  # each (B, T, H, K)
        query = apply_rotary(query, table).transpose(1, 2)  # (B, T, H, K) -> (B, H, T, K)
        key = apply_rotary(key, table).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            end = start + length
            cache.keys[:, :, start:end] = key
            cache.values[:, :, start:end] = value
            key, value = cache.keys[:, :, :end], cache.values[:, :, :end]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, width))


class GatedFeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases. Source: arXiv:2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
