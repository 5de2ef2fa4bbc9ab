"""Two-dimensional rotary position embedding on interleaved pairs.

Shapes: B batch, H heads, T positions, K head width (even, divisible by 4), P = K/2 pairs.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class RotaryTable2D(nn.Module):
    """The table of a model, in float32 whatever format the model has.

    It follows the model to another device and is computed anew there; it is no part of its state.
    """

    table_TP2: Tensor

    def __init__(
        self, grid_size: int, head_width: int, *, num_condition_slots: int, base: float
    ) -> None:
        """Make the table; see rotary_table_2d."""
        super().__init__()
        self._sizes = (grid_size, head_width, num_condition_slots, base)
        self.register_buffer("table_TP2", self._make(None), persistent=False)

    def forward(self, start: int, length: int) -> Tensor:
        """Rows of consecutive positions: [length, P, 2]."""
        return self.table_TP2[start : start + length]

    def _make(self, device: torch.device | None) -> Tensor:
        grid_size, head_width, num_slots, base = self._sizes
        return rotary_table_2d(
            grid_size, head_width, num_condition_slots=num_slots, base=base, device=device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go where the model goes; angles in bfloat16 would confuse neighbouring codes."""
        super()._apply(fn, recurse)
        self.table_TP2 = self._make(self.table_TP2.device)
        return self


def rotary_table_2d(
    grid_size: int,
    head_width: int,
    *,
    num_condition_slots: int,
    base: float = 10000.0,
    device: torch.device | None = None,
) -> Tensor:
    """Cosines and sines for condition slots followed by a square grid of codes.

    The first half of the pairs turns with the row, the second with the column. At condition
    slots the table is ZERO, not the identity: queries and keys vanish there, as in the public
    LlamaGen.

    Args:
        grid_size: codes per side.
        head_width: K, divisible by 4.
        num_condition_slots: positions before the first code.
        base: the slowest pair turns by about 1 / base per code.
        device: where to put it; None for the current default.
    Returns:
        [num_condition_slots + grid_size^2, K/2, 2] float32: (cos, sin) per pair.
    Source: LlamaGen, arXiv:2406.06525.
    """
    half = head_width // 2
    exponents = torch.arange(0, half, 2, device=device).float() / half
    inverse = 1.0 / base**exponents
    angles = torch.outer(torch.arange(grid_size, device=device).float(), inverse)  # [grid, K/4]
    rows = angles[:, None, :].expand(grid_size, grid_size, -1)
    columns = angles[None, :, :].expand(grid_size, grid_size, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [grid^2, K/2]
    table = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([table.new_zeros(num_condition_slots, half, 2), table])


def apply_rotary(x_BTHK: Tensor, table_TP2: Tensor) -> Tensor:
    """Turn each interleaved pair (0,1), (2,3), ... by its position's angle, in float32.

    Args:
        x_BTHK: queries or keys.
        table_TP2: the rows of the table for these T positions, P = K/2.
    Returns:
        [B, T, H, K] in the dtype of x.
    """
    # As complex numbers: one fused product instead of six strided ones, four times as fast.
    pairs = torch.view_as_complex(x_BTHK.float().unflatten(-1, (-1, 2)))  # (B, T, H, P)
    turned = pairs * torch.view_as_complex(table_TP2)[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x_BTHK.dtype)
