"""Next-token sampling with a key-value cache, and teacher-forced scoring of the same policy.

Owns the loop over tokens; must not know rewards or Ray. There is no host synchronisation
inside the loop.

Shapes: B images, L image tokens, V codebook.
"""

import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.policies.protocol import Policy
from rlgen.sampling.logits import guide, processed_logprobs
from rlgen.types import SamplingSettings


def check_guidance(policy: Policy, settings: SamplingSettings) -> None:
    """Refuse guidance for a policy without a null class.

    Raises:
        ConfigError: names the scale and the way out.
    """
    if settings.is_guided and policy.null_class is None:
        raise ConfigError(
            f"cfg_scale = {settings.cfg_scale} needs a null class, and this policy has none; "
            "use cfg_scale 1 or a policy trained with dropped conditions."
        )


@torch.inference_mode()
def sample_tokens(
    policy: Policy, class_ids_B: Tensor, noise_BL: Tensor, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Draw images token by token.

    Args:
        policy: the model; on the device of class_ids_B.
        class_ids_B: int64.
        noise_BL: float64 uniform in [0, 1), one number per token.
        settings: the distribution.
    Returns:
        tokens [B, L] int64, and their log-probs [B, L] float32 under that distribution.
    """
    check_guidance(policy, settings)
    conditions = with_null_half(policy, class_ids_B) if settings.is_guided else class_ids_B
    cache = policy.allocate_cache(len(conditions))
    tokens, logprobs = [], []
    logits = policy.prefill(conditions, cache)
    for position in range(policy.num_tokens):
        if settings.is_guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, settings.cfg_scale)
        logprobs_BV = processed_logprobs(logits, settings)
        drawn = _draw(logprobs_BV, noise_BL[:, position])
        tokens.append(drawn)
        logprobs.append(logprobs_BV.gather(-1, drawn[:, None])[:, 0])
        if position + 1 < policy.num_tokens:
            fed = drawn.repeat(2) if settings.is_guided else drawn
            logits = policy.decode_one(fed, position, cache)
    return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)


def with_null_half(policy: Policy, class_ids_B: Tensor) -> Tensor:
    """[B] class ids -> [2B]: the conditions, then as many null classes."""
    assert policy.null_class is not None, "check_guidance comes first"
    return torch.cat([class_ids_B, torch.full_like(class_ids_B, policy.null_class)])


def _draw(logprobs_BV: Tensor, noise_B: Tensor) -> Tensor:
    """Invert the cumulative distribution in float64; codes of probability 0 are never drawn."""
    cumulative = logprobs_BV.double().exp().cumsum(dim=-1)
    threshold = noise_B[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return drawn.clamp_max(logprobs_BV.shape[-1] - 1)  # only a NaN could lie beyond
