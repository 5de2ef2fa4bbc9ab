"""Static key-value caches.

Owns where keys and values of earlier positions lie; nn/attention.py and nn/var_blocks.py own
what is computed with them.

Shapes: B batch, T positions, H heads, K head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.nn.packed import PackedLinears

_CPU_STRIDE = 32
"""Positions by which the laid-out part of a TokenCache grows on a CPU."""


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


class TokenCache:
    """Keys and values of one layer that is fed position by position; allocated once.

    A product with one query reads memory at full speed only if what it reads lies together. So
    on a CPU `keys` and `values` show the first positions alone, side by side in the allocated
    room, and are laid out anew when those are full. Elsewhere kernels take strides, and graphs
    need addresses that stay: there they show all positions from the start.
    """

    keys: Tensor
    """[B, H, T, K]: filled positions, and zeros after them."""
    values: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        length: int,
        head_width: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shape = (batch, heads, length, head_width)
        size = batch * heads * length * head_width
        self._rooms = torch.zeros(2, size, device=device, dtype=dtype)
        self._lay_out(min(length, _CPU_STRIDE) if device.type == "cpu" else length)

    def put(self, position: int, key_BHK: Tensor, value_BHK: Tensor) -> None:
        """Fill the next position."""
        filled = self.keys.shape[2]
        if position == filled:
            keys, values = self.keys.clone(), self.values.clone()
            self._lay_out(min(self._shape[2], filled + _CPU_STRIDE))
            for shown, before in ((self.keys, keys), (self.values, values)):
                shown[:, :, :filled] = before
                shown[:, :, filled:] = 0
        self.keys[:, :, position] = key_BHK
        self.values[:, :, position] = value_BHK

    def _lay_out(self, length: int) -> None:
        batch, heads, _, head_width = self._shape
        size = batch * heads * length * head_width
        self.keys = self._rooms[0, :size].view(batch, heads, length, head_width)
        self.values = self._rooms[1, :size].view(batch, heads, length, head_width)


class DecodeCache:
    """What the decoding of next-token policies keeps between positions."""

    def __init__(
        self, num_layers: int, batch: int, heads: int, length: int, *, weight: Tensor
    ) -> None:
        """Make empty caches for a model whose head is `weight` [V, D]."""
        head_width = weight.shape[1] // heads
        self.layers = [
            TokenCache(batch, heads, length, head_width, device=weight.device, dtype=weight.dtype)
            for _ in range(num_layers)
        ]
        self.linear = PackedLinears()
        self.bias_B11T: Tensor | None = None
        """Added to the scores of all T_max positions, float32; None if there is nothing to add."""
