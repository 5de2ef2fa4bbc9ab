"""Counter-based random numbers: what a sample gets depends on its key alone.

Owns the Philox 4x32-10 generator in tensor arithmetic, so that every device, worker and batch
split draws the same numbers for (run seed, stream, step, condition index, sample index).

Shapes: B images, L image tokens.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from typing import get_args

import torch
from torch import Tensor

from rlgen.types import Purpose

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words per counter.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2^32).
        key: two words in [0, 2^32).
    Returns:
        four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A wrapped int64 product still has the right 64 bits; the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform_noise(
    *,
    seed: int,
    purpose: Purpose,
    step: int,
    condition_indices_B: Tensor,
    sample_indices_B: Tensor,
    num_tokens: int,
) -> Tensor:
    """One uniform number per token, keyed by the image's identity.

    Args:
        seed: run seed in [0, 2^32).
        purpose: which stream; training, bootstrap and evaluation never share numbers.
        step: training step.
        condition_indices_B: int64, place of the image's condition in the step.
        sample_indices_B: int64, place of the image in its group.
        num_tokens: L.
    Returns:
        [B, L] float64 in [0, 1) with 53 random bits.
    """
    stream = get_args(Purpose).index(purpose)
    device = condition_indices_B.device
    num_blocks = -(-num_tokens // 2)  # a block of four words makes two numbers
    blocks = torch.arange(num_blocks, device=device)
    shape = (len(condition_indices_B), num_blocks)
    words = philox_4x32(
        (
            blocks.expand(shape),
            torch.full(shape, step, device=device, dtype=torch.int64),
            condition_indices_B[:, None].expand(shape),
            sample_indices_B[:, None].expand(shape),
        ),
        (seed & _MASK, stream),
    )
    first = _to_uniform(words[0], words[1])
    second = _to_uniform(words[2], words[3])
    return torch.stack([first, second], dim=-1).flatten(1)[:, :num_tokens]


def _to_uniform(high: Tensor, low: Tensor) -> Tensor:
    """53 bits of two words as a float64 in [0, 1)."""
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53
