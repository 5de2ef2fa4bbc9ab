"""Search for the nearest code.

Owns the distance and its cost in memory; must not know how codes are stored or decoded.
"""

import torch
from torch import Tensor

_MAX_DISTANCES = 2**27
"""Distances held at a time: half a gigabyte in float32."""


@torch.no_grad()
def nearest_codes(latents_NC: Tensor, codes_VC: Tensor) -> Tensor:
    """Return the codes at the smallest squared distance, in float32 even under autocast.

    Args:
        latents_NC: [N, C], one row per token.
        codes_VC: [V, C], the codebook.
    Returns:
        int64 [N].
    """
    with torch.autocast(latents_NC.device.type, enabled=False):
        latents_NC, codes_VC = latents_NC.float(), codes_VC.float()
        # |z - c|^2 without |z|^2, which is the same for all codes.
        squares_V = codes_VC.square().sum(1)
        rows = max(1, _MAX_DISTANCES // len(codes_VC))
        nearest = [
            torch.addmm(squares_V, part_NC, codes_VC.T, alpha=-2).argmin(1)
            for part_NC in latents_NC.split(rows)
        ]
        return torch.cat(nearest)
