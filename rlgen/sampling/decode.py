"""Sampling with a key-value cache: block by block, one token or one scale at a time.

Owns the loop over blocks; must not know rewards or Ray. There is no host synchronisation
inside the loop.

Shapes: B images, L image tokens, n tokens of a block, V codebook.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.policies.protocol import Policy
from rlgen.sampling.logits import guidance_scales, guide, processed_logprobs
from rlgen.types import SamplingSettings

Choose = Callable[[Tensor, int], Tensor]
"""From the guided logits [B, n, V] of a block to its tokens [B, n]."""


def check_guidance(policy: Policy, settings: SamplingSettings) -> None:
    """Refuse guidance for a policy without a null class.

    Raises:
        ConfigError: names the scale and the way out.
    """
    if settings.is_guided and policy.null_class is None:
        raise ConfigError(
            f"cfg_scale = {settings.cfg_scale} needs a null class, and this policy has none; "
            "use cfg_scale 1, or a policy trained with dropped conditions."
        )


@torch.inference_mode()
def sample_tokens(
    policy: Policy, class_ids_B: Tensor, noise_BL: Tensor, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Draw images block by block.

    Args:
        policy: the model; on the device of class_ids_B.
        class_ids_B: int64.
        noise_BL: float64 uniform in [0, 1), one number per token.
        settings: the distribution.
    Returns:
        tokens [B, L] int64, and their log-probs [B, L] float32 under that distribution.
    """
    noise_of_block = noise_BL.split(policy.block_sizes, dim=1)
    logprobs: list[Tensor] = []

    def draw(logits_BnV: Tensor, block: int) -> Tensor:
        logprobs_BnV = processed_logprobs(logits_BnV, settings)
        drawn_Bn = _invert_cumulative(logprobs_BnV, noise_of_block[block])
        logprobs.append(logprobs_BnV.gather(-1, drawn_Bn[..., None])[..., 0])
        return drawn_Bn

    tokens_BL = decode(policy, class_ids_B, settings, draw)
    return tokens_BL, torch.cat(logprobs, dim=1)


def decode(
    policy: Policy, class_ids_B: Tensor, settings: SamplingSettings, choose: Choose
) -> Tensor:
    """Run the cached decoding with tokens chosen by the caller, such as given ones.

    Returns:
        tokens [B, L] int64.
    """
    check_guidance(policy, settings)
    conditions = with_null_half(policy, class_ids_B) if settings.is_guided else class_ids_B
    scales = guidance_scales(policy, settings)
    cache = policy.allocate_cache(len(conditions))
    chosen: list[Tensor] = []
    logits = policy.prefill(conditions, cache)
    for block, scale in enumerate(scales):
        if settings.is_guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, scale)
        chosen.append(choose(logits, block))
        if block + 1 < len(scales):
            fed = chosen[-1].repeat(2, 1) if settings.is_guided else chosen[-1]
            logits = policy.decode_next(fed, block, cache)
    return torch.cat(chosen, dim=1)


def with_null_half(policy: Policy, class_ids_B: Tensor) -> Tensor:
    """[B] class ids -> [2B]: the conditions, then the same images without them."""
    return torch.cat([class_ids_B, policy.null_of(class_ids_B)])


def _invert_cumulative(logprobs_BnV: Tensor, noise_Bn: Tensor) -> Tensor:
    """Draw by the cumulative distribution in float64; codes of probability 0 are never drawn."""
    cumulative = logprobs_BnV.exp().cumsum(dim=-1, dtype=torch.float64)
    threshold = noise_Bn[..., None] * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    return drawn.clamp_max(logprobs_BnV.shape[-1] - 1)  # only a NaN could lie beyond
