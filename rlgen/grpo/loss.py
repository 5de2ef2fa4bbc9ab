"""The policy loss and the KL penalty: pure functions on tensors.

Shapes: B images, L image tokens. All log-probs are nats of the drawn tokens. Means over tokens are
weighted with weights_L, whose own mean is 1; None weighs all tokens alike.
Source: arXiv:2402.03300 (GRPO), arXiv:1707.06347 (clipping); the sequence ratio follows
arXiv:2507.18071, the split of a stale ratio into a clipped and a truncated one arXiv:2110.00641.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Importance:
    """How often each token, or image, would count under the policy before the update."""

    weights: Tensor
    """[B, L] (token) or [B, 1] (sequence), detached, at most the cap."""
    truncated: Tensor
    """bool, where the cap holds."""


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate per image, with what is watched about the ratio."""

    loss_B: Tensor
    """[B] float32, to be minimised; mean over the image's tokens."""
    ratio: Tensor
    """[B, L] (token) or [B, 1] (sequence), detached."""
    clipped: Tensor
    """bool, where the clipped branch is the active one."""


def importance_weights(
    proximal_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    *,
    ratio: Literal["token", "sequence"],
    cap: float,
    weights_L: Tensor | None = None,
) -> Importance:
    """min(p_proximal / p_rollout, cap): corrects for samples of an older policy.

    Args:
        proximal_logprobs_BL: under the policy before the update.
        rollout_logprobs_BL: under the policy that sampled.
        ratio: "token": of each token; "sequence": exp of the mean difference.
        cap: at least 1; bounds the variance.
        weights_L: float32, of the tokens in a sequence's mean.
    Source: truncation arXiv:1802.01561, section 4.1.
    """
    difference = (proximal_logprobs_BL - rollout_logprobs_BL).detach()
    if ratio == "sequence":
        difference = token_mean(difference, weights_L)[:, None]
    ratios = difference.exp()
    return Importance(weights=ratios.clamp(max=cap), truncated=ratios > cap)


def clipped_surrogate(
    logprobs_BL: Tensor,
    proximal_logprobs_BL: Tensor,
    advantages_B: Tensor,
    *,
    ratio: Literal["token", "sequence"],
    clip_low: float,
    clip_high: float,
    weights_L: Tensor | None = None,
    importance: Importance | None = None,
) -> Surrogate:
    """-w min(r A, clip(r) A), with one ratio and one weight per token or per image.

    Args:
        logprobs_BL: under the policy that is trained; carries the gradient.
        proximal_logprobs_BL: under the policy before the update; on policy that is the sampler's.
        advantages_B: float32.
        ratio: "token": exp(new - old) of each token; "sequence": exp of the mean difference.
        clip_low: ratios under 1 - clip_low gain nothing.
        clip_high: ratios over 1 + clip_high gain nothing.
        weights_L: float32, of the tokens.
        importance: w, of the same `ratio`; None is 1 for all.
    """
    difference = logprobs_BL - proximal_logprobs_BL
    if importance is not None:
        # A filter may leave out what an older policy drew: such a token counts 0 times, whatever
        # its ratio, which would be 0 / 0.
        difference = difference.masked_fill(proximal_logprobs_BL.isinf(), 0.0)
    if ratio == "sequence":
        difference = token_mean(difference, weights_L)[:, None]
        weights_L = None
    ratios = difference.exp()
    advantages = advantages_B[:, None]
    free = ratios * advantages
    limited = ratios.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    gain = torch.minimum(free, limited)
    if importance is not None:
        gain = gain * importance.weights
    return Surrogate(
        loss_B=-token_mean(gain, weights_L),
        ratio=ratios.detach(),
        clipped=(limited < free).detach(),
    )


def k3_divergence(
    logprobs_BL: Tensor,
    ref_logprobs_BL: Tensor,
    weights_L: Tensor | None = None,
    *,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """exp(d) - d - 1 with d = ref - new, never negative.

    Where top-k or top-p leave a token out under either policy d is infinite; it counts as 0.

    Args:
        logprobs_BL: under the policy that is trained.
        ref_logprobs_BL: under the reference.
        weights_L: float32, of the tokens.
        level: "token": d of each token, then the mean, which is unbiased for KL(new || ref) per
            token; "sequence": of the mean d, as arXiv:2603.23086 does.
    Returns:
        [B] float32 nats.
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    difference = ref_logprobs_BL - logprobs_BL
    difference = difference.masked_fill(~difference.isfinite(), 0.0)
    if level == "sequence":
        difference = token_mean(difference, weights_L)[:, None]
        weights_L = None
    return token_mean(difference.exp() - difference - 1.0, weights_L)


def token_mean(values_BL: Tensor, weights_L: Tensor | None) -> Tensor:
    """Weighted mean over the tokens: [B]."""
    return (values_BL if weights_L is None else values_BL * weights_L).mean(dim=1)


def block_weights(block_sizes: Sequence[int], alpha: float) -> Tensor | None:
    """Weights of tokens that are drawn n at a time: 1 / n^alpha, scaled to mean 1.

    For VAR n = h*w of a scale, whose many tokens would else outweigh the coarse ones.

    Returns:
        [L] float32, or None if all are alike.
    Source: arXiv:2601.02256, which takes alpha between 0.6 and 0.8.
    """
    if alpha == 0.0 or max(block_sizes) == 1:
        return None
    sizes = torch.tensor(block_sizes, dtype=torch.float64)
    weights = (sizes**-alpha).repeat_interleave(torch.tensor(block_sizes))
    return (weights / weights.mean()).float()
