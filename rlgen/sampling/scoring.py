"""Teacher-forced log-probs of given tokens, under the distribution they were sampled from.

Shapes: B images, L image tokens, V codebook.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlgen.policies.protocol import Policy
from rlgen.sampling.decode import check_guidance, with_null_half
from rlgen.sampling.logits import entropy, guidance_scales, guide, processed_logprobs
from rlgen.types import SamplingSettings

Forward = Callable[[Tensor, Tensor], Tensor]


def score_tokens(
    policy: Policy,
    class_ids_B: Tensor,
    tokens_BL: Tensor,
    settings: SamplingSettings,
    *,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens and entropy of each position's distribution.

    Args:
        policy: the model.
        class_ids_B: int64.
        tokens_BL: int64 codes.
        settings: the distribution that the sampler used.
        forward: what to call for logits, if not the policy itself (a data-parallel wrapper).
    Returns:
        logprobs [B, L] and entropies [B, L], float32 nats.
    """
    check_guidance(policy, settings)
    run = policy.teacher_forced if forward is None else forward
    if settings.is_guided:
        both = run(with_null_half(policy, class_ids_B), tokens_BL.repeat(2, 1))
        conditional, unconditional = both.chunk(2)
        scales = torch.tensor(guidance_scales(policy, settings), device=both.device)
        sizes = torch.tensor(policy.block_sizes, device=both.device)
        scale_L1 = scales.repeat_interleave(sizes, output_size=policy.num_tokens)[:, None]
        logits_BLV = guide(conditional, unconditional, scale_L1)
    else:
        logits_BLV = run(class_ids_B, tokens_BL)
    logprobs_BLV = processed_logprobs(logits_BLV, settings)
    drawn = torch.gather(logprobs_BLV, -1, tokens_BL[..., None])[..., 0]
    return drawn, entropy(logprobs_BLV)
