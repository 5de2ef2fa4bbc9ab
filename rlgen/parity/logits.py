"""What the transformers' cases have in common: building, and logits in the forms that are stored.

Shapes: B images, L image tokens, V codebook.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.parity.cases import Case, Outputs
from rlgen.policies.protocol import Policy
from rlgen.sampling.decode import decode
from rlgen.types import SamplingSettings


def forced_logits(
    policy: Policy, class_ids_B: Tensor, tokens_BL: Tensor, settings: SamplingSettings
) -> Tensor:
    """Guided logits [B, L, V] of cached decoding with the given tokens fed back."""
    given = tokens_BL.split(policy.block_sizes, dim=1)
    logits: list[Tensor] = []

    def choose(logits_BnV: Tensor, block: int) -> Tensor:
        logits.append(logits_BnV)
        return given[block]

    with torch.inference_mode():
        decode(policy, class_ids_B, settings, choose)
    return torch.cat(logits, dim=1)


def logit_arrays(case: Case, logits_BLV: Mapping[str, Tensor], tokens_BL: Tensor) -> Outputs:
    """The stored forms of logits: whole, or a slice with the token's log-prob and logsumexp."""
    found: Outputs = {}
    for name, logits in logits_BLV.items():
        if f"out.{name}" in case.arrays:
            found[f"out.{name}"] = logits
        if f"out.{name}_slice" in case.arrays:
            positions = case.tensor("in.positions")
            ids = case.tensor("in.vocab_ids")
            found[f"out.{name}_slice"] = logits[:, positions][..., ids]
        logprobs = logits.log_softmax(dim=-1).gather(-1, tokens_BL[..., None])[..., 0]
        found[f"out.{name}_token_logprob"] = logprobs
        found[f"out.{name}_logsumexp"] = logits.logsumexp(dim=-1)
    return found


def token_loss(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Mean cross entropy of the tokens, a scalar."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())


def labels_and_tokens(case: Case) -> tuple[Tensor, Tensor]:
    """in.labels [B] and in.tokens [B, L] as int64."""
    return (
        case.tensor("in.labels").long(),
        case.tensor("in.tokens").long(),
    )
