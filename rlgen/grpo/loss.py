"""The policy loss and the KL penalty: pure functions on tensors.

Shapes: B images, L image tokens. All log-probs are nats of the drawn tokens.
Source: arXiv:2402.03300 (GRPO), arXiv:1707.06347 (clipping); the sequence ratio follows
arXiv:2507.18071.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate per image, with what is watched about the ratio."""

    loss_B: Tensor
    """[B] float32, to be minimised; mean over the image's tokens."""
    ratio: Tensor
    """[B, L] (token) or [B, 1] (sequence), detached."""
    clipped: Tensor
    """bool, where the clipped branch is the active one."""


def clipped_surrogate(
    logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    advantages_B: Tensor,
    *,
    ratio: Literal["token", "sequence"],
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """-min(r A, clip(r) A), with one ratio per token or per image.

    Args:
        logprobs_BL: under the policy that is trained; carries the gradient.
        rollout_logprobs_BL: under the policy that sampled.
        advantages_B: float32.
        ratio: "token": exp(new - old) of each token; "sequence": exp of the mean difference.
        clip_low: ratios under 1 - clip_low gain nothing.
        clip_high: ratios over 1 + clip_high gain nothing.
    """
    difference = logprobs_BL - rollout_logprobs_BL
    if ratio == "sequence":
        difference = difference.mean(dim=1, keepdim=True)
    ratios = difference.exp()
    advantages = advantages_B[:, None]
    free = ratios * advantages
    limited = ratios.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return Surrogate(
        loss_B=-torch.minimum(free, limited).mean(dim=1),
        ratio=ratios.detach(),
        clipped=(limited < free).detach(),
    )


def k3_divergence(logprobs_BL: Tensor, ref_logprobs_BL: Tensor) -> Tensor:
    """Per-image mean of exp(d) - d - 1 with d = ref - new: unbiased for KL(new || ref), never < 0.

    Returns:
        [B] float32 nats per token.
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    difference = ref_logprobs_BL - logprobs_BL
    return (difference.exp() - difference - 1.0).mean(dim=1)
