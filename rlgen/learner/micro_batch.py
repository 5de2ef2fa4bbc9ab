"""A rank's batch in pieces that fit into memory; their gradients are summed.

Shapes: B images, L image tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.types import LearnerBatch


@dataclass
class MicroBatch:
    """Some images of this rank, on its device."""

    class_ids_B: Tensor
    """int64."""
    tokens_BL: Tensor
    """int64."""
    rollout_logprobs_BL: Tensor
    advantages_B: Tensor
    ref_logprobs_BL: Tensor | None = None
    """Under the reference; None without a KL."""
    proximal_logprobs_BL: Tensor | None = None
    """Under the policy before the update, where an older one sampled; the first pass finds it."""


def micro_batches(batch: LearnerBatch, *, size: int, device: torch.device) -> list[MicroBatch]:
    """Cut a rank's batch into pieces of up to `size` images."""
    tensors = (
        torch.from_numpy(array).to(device).split(size)
        for array in (
            batch.class_ids_B,
            batch.tokens_BL.astype("int64"),
            batch.rollout_logprobs_BL,
            batch.advantages_B,
        )
    )
    return [MicroBatch(*piece) for piece in zip(*tensors, strict=True)]
