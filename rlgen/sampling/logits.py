"""The one definition of the distribution that is sampled and scored.

Owns guidance, temperature, top-k and top-p. The sampler draws from it and the learner takes
its log-probs, so that both always mean the same policy.

Shapes: `...` any leading shape, V codebook.
"""

import torch
from torch import Tensor

from rlgen.policies.protocol import Policy
from rlgen.types import SamplingSettings


def guide(conditional: Tensor, unconditional: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: u + s (c - u). Source: arXiv:2207.12598.

    VAR writes (1 + t) c - t u, which is this with s = 1 + t.
    """
    return unconditional + cfg_scale * (conditional - unconditional)


def guidance_scales(policy: Policy, settings: SamplingSettings) -> list[float]:
    """The guidance scale of each block: 1 + (cfg_scale - 1) * ramp.

    Blocks after cfg_interval + 1 are not guided, as in LlamaGen, where block 0 is the prefill.
    """
    last = len(policy.guidance_ramp)
    if settings.cfg_interval is not None:
        last = settings.cfg_interval + 1
    return [
        1.0 + (settings.cfg_scale - 1.0) * (share if block <= last else 0.0)
        for block, share in enumerate(policy.guidance_ramp)
    ]


def processed_logprobs(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Log-probabilities after temperature, top-k and top-p, renormalised.

    Every code whose logit equals the k-th largest is kept. Top-p keeps the likeliest codes up
    to and including the first one past the mass.

    Args:
        logits: [..., V] float32, guidance already applied.
    Returns:
        [..., V] float32 nats; -inf for codes cut off.
    """
    logits = logits.float()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        kth = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if settings.top_p < 1.0:
        logits = logits.masked_fill(_beyond_top_p(logits, settings.top_p), -torch.inf)
    return logits.log_softmax(dim=-1)


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; codes cut off contribute nothing."""
    # Zero, not a huge number: a gradient larger than 1 times that would be infinite, and NaN.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(dim=-1)


def _beyond_top_p(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
